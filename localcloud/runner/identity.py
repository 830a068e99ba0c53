"""Which user a container's process is, and what it may do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from localcloud.runner.fields import ConfigError
from localcloud.runner.images import Image

# By number (linux/capability.h), and what a container has unless told otherwise (containerd's default).
# fmt: off
CAPABILITIES = [
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
    "LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
    "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
    "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
    "CHECKPOINT_RESTORE",
]
USUAL = {
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "NET_BIND_SERVICE",
    "NET_RAW", "SYS_CHROOT", "MKNOD", "AUDIT_WRITE", "SETFCAP",
}
# fmt: on


@dataclass(frozen=True)
class Identity:
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def identity(pod: Mapping[str, Any], container: Mapping[str, Any], image: Image) -> Identity:
    """The container's settings before the pod's before the image's. Raises `ConfigError` where root is forbidden and
    the image would run as root, or as a user of whom only the name is known."""
    security = (pod["spec"].get("securityContext") or {}) | (container.get("securityContext") or {})
    user, _, group = image.user.partition(":")
    people = _table(image.rootfs, "etc/passwd")
    uid, gid, home = security.get("runAsUser"), security.get("runAsGroup"), "/"
    if uid is None:
        if security.get("runAsNonRoot") and user and not user.isdigit():
            raise ConfigError(f"container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user "
                              "is non-root")  # fmt: skip
        uid = _number(user or "0", people, f"user {user}")
    if security.get("runAsNonRoot") and uid == 0:
        raise ConfigError("container has runAsNonRoot and image will run as root")
    person = next((row for row in people if row[2] == str(uid)), None)
    if person is not None:
        home = person[5] or "/"
    if gid is None and security.get("runAsUser") is None and group:
        gid = _number(group, _table(image.rootfs, "etc/group"), f"group {group}")
    if gid is None:
        gid = int(person[3]) if person is not None else 0
    extra = [*security.get("supplementalGroups", []), security.get("fsGroup")]
    return Identity(uid, gid, tuple(sorted({item for item in extra if item is not None})), home)


def dropped_capabilities(container: Mapping[str, Any]) -> list[int]:
    """The numbers of all that the container's processes can never have."""
    security = container.get("securityContext") or {}
    if security.get("privileged"):
        return []
    asked = security.get("capabilities") or {}
    added, dropped = ({name.removeprefix("CAP_") for name in asked.get(key) or ()} for key in ("add", "drop"))
    kept = (set() if "ALL" in dropped else USUAL - dropped) | (set(CAPABILITIES) if "ALL" in added else added)
    return [number for number, name in enumerate(CAPABILITIES) if name not in kept]


def _number(text: str, rows: list[list[str]], what: str) -> int:
    if text.isdigit():
        return int(text)
    found = next((row[2] for row in rows if row[0] == text), None)
    if found is None:
        raise ConfigError(f"{what}: not in the image's /etc/passwd or /etc/group")
    return int(found)


def _table(rootfs: Path, name: str) -> list[list[str]]:
    file = rootfs / name
    if file.is_symlink() or not file.is_file():
        return []
    rows = [line.split(":") for line in file.read_text(errors="replace").splitlines()]
    return [row for row in rows if len(row) >= (6 if name.endswith("passwd") else 3)]
