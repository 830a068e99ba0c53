"""Enters namespaces and becomes a container's process: `python enter.py sandbox|run|exec SPEC.json FD`.

Only the standard library, so that it starts in some milliseconds, and `ctypes`, because `os.setns` came with Python
3.12. On FD it writes one JSON line, `{"pid": N}` (as the machine counts) once all is prepared, and `{"error": "..."}`
when anything fails; the end of FD says that the process runs. Whoever started us kills us when it dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import stat
import sys
from pathlib import Path
from typing import Any, NoReturn

# linux/sched.h, sys/mount.h, linux/prctl.h, syscall numbers of x86_64 and aarch64
NEWNS, NEWUTS, NEWIPC, NEWNET, NEWPID = 0x00020000, 0x04000000, 0x08000000, 0x40000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = (
    1,
    2,
    4,
    8,
    32,
    4096,
    16384,
    1 << 18,
)
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 24, 38
OPEN_TREE, MOVE_MOUNT, AT_FDCWD, OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = 428, 429, -100, 1, 4  # Linux 5.2
PIVOT_ROOT = 41 if os.uname().machine == "aarch64" else 155
START_FAILED = 128  # the exit code that a kubelet shows where the process could not be started

DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9), "tty": (5, 0)}
LINKS = {
    "ptmx": "pts/ptmx",
    "fd": "/proc/self/fd",
    "stdin": "/proc/self/fd/0",
    "stdout": "/proc/self/fd/1",
    "stderr": "/proc/self/fd/2",
}

_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str | Path, kind: str = "", flags: int = 0, data: str = "") -> None:
    result = _libc.mount(source.encode(), str(target).encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _call(f"mount {source} at {target}", result)


def bind(source: str | Path, target: Path, *, read_only: bool = False) -> None:
    mount(str(source), target, flags=MS_BIND | MS_REC)
    _lock(target, read_only)


def attach(tree: int, target: Path, *, read_only: bool = False) -> None:
    """Mount what `open_tree` has copied."""
    flags = MOVE_MOUNT_F_EMPTY_PATH
    _call(f"mount at {target}", _libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, str(target).encode(), flags))
    os.close(tree)
    _lock(target, read_only)


def _lock(target: Path, read_only: bool) -> None:
    if read_only:  # the kernel takes that only in a second step, and then forgets the flags that it is not told
        known = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC)
        mount("", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | known)


def join(pid: int, *names: str) -> None:
    """Into these namespaces of process `pid`, the mounts last: afterwards its /proc may not be ours."""
    handles = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in names]
    for name, handle in zip(names, handles, strict=True):
        _call(f"setns {name}", _libc.setns(handle, 0))
        os.close(handle)


def within(root: Path, path: str) -> Path:
    """Where `path` of the container is from outside: no symbolic link of the image leads out of `root`."""
    found, left, links = root, [part for part in path.split("/") if part], 0
    while left:
        part = left.pop(0)
        if part == "..":
            found = found if found == root else found.parent
        elif part != ".":
            found = found / part
            if found.is_symlink():
                links += 1
                if links > 40:
                    raise OSError(f"{path}: too many symbolic links in the image")
                target = os.readlink(found)
                found = root if target.startswith("/") else found.parent
                left = [piece for piece in target.split("/") if piece] + left
    return found


def sandbox(spec: dict[str, Any], fd: int) -> NoReturn:
    """Hold a pod's namespaces and its volumes in memory until killed."""
    _call("unshare", _libc.unshare(NEWNS | NEWUTS | NEWIPC | (NEWNET if spec["network"] else 0)))
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    for volume in spec["tmpfs"]:
        size = f"size={volume['size']}," if volume["size"] else ""
        mount("tmpfs", volume["path"], "tmpfs", MS_NOSUID | MS_NODEV, f"{size}mode={volume['mode']:o}")
        os.chown(volume["path"], -1, volume["group"])
    socket.sethostname(spec["hostname"])
    _say(fd, {"pid": os.getpid()})
    os.execvp("sleep", ["sleep", "infinity"])  # so that what waits here is small


def run(spec: dict[str, Any], fd: int) -> NoReturn:
    """Become the first process of a PID namespace in those of the pod, and exit as that does."""
    _call("unshare", _libc.unshare(NEWPID))
    child = os.fork()  # only a child is in the new namespace
    if child:
        os.close(fd)
        _exit_as(child)
    die_with_parent()
    own = int(os.readlink("/proc/self"))  # /proc is the machine's still
    # The image's root may be a mount that is younger than the sandbox: only the runner's own namespace shows it. The
    # volumes in memory are in the sandbox's alone, so that they end with it: they are taken along from there.
    runner = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    join(spec["sandbox"], "net", "uts", "ipc", "mnt")
    memory = {item["path"]: _taken(item) for item in spec["mounts"] if item["in_memory"]}
    _call("setns", _libc.setns(runner, 0))
    _call("unshare", _libc.unshare(NEWNS))
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    root = Path(spec["root"])
    for name in ("root", "upper", "work"):
        os.makedirs(spec[name], exist_ok=True)
    layers = f"lowerdir={spec['rootfs']},upperdir={spec['upper']},workdir={spec['work']}"
    mount("overlay", root, "overlay", 0, layers)
    _system(root, spec)
    for item in spec["mounts"]:
        target = within(root, item["path"])
        if item["path"] in memory:
            target.mkdir(parents=True, exist_ok=True)
            attach(memory[item["path"]], target, read_only=item["read_only"])
            continue
        if os.path.isdir(item["source"]):
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.touch()
        bind(item["source"], target, read_only=item["read_only"])
    within(root, spec["working_dir"]).mkdir(parents=True, exist_ok=True)
    if spec["read_only_root"]:
        mount("", root, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)
    os.chdir(root)
    _call("pivot_root", _libc.syscall(PIVOT_ROOT, b".", b"."))
    _call("umount", _libc.umount2(b".", MNT_DETACH))
    os.chdir("/")
    for number in (1, 2):
        os.fchown(number, spec["uid"], spec["gid"])  # or it could not open /dev/stdout
    _become(spec)
    _say(fd, {"pid": own})
    _execute(spec)


def _taken(item: dict[str, Any]) -> int:
    """A copy of a mount in memory, or of a folder in it (subPath: only in here can it be seen and made)."""
    folder, volume = Path(item["source"]), Path(item["volume"])
    if not folder.exists():
        folder.mkdir(parents=True)
        about = volume.stat()
        os.chown(folder, about.st_uid, about.st_gid)
        folder.chmod(about.st_mode & 0o7777)
    handle = _libc.syscall(OPEN_TREE, AT_FDCWD, str(folder).encode(), OPEN_TREE_CLONE | os.O_CLOEXEC)
    _call(f"open_tree {folder}", 0 if handle >= 0 else -1)
    return int(handle)


def _system(root: Path, spec: dict[str, Any]) -> None:
    for name in ("proc", "dev", "sys"):
        (root / name).mkdir(exist_ok=True)
    mount("proc", root / "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("sysfs", root / "sys", "sysfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    if not spec["privileged"]:
        for name in ("sys", "sysrq-trigger"):
            if (root / "proc" / name).exists():
                bind(root / "proc" / name, root / "proc" / name, read_only=True)
    dev = root / "dev"
    mount("tmpfs", dev, "tmpfs", MS_NOSUID, "mode=755,size=65536k")
    for name, (major, minor) in DEVICES.items():
        os.mknod(dev / name, 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        os.chmod(dev / name, 0o666)  # whatever our umask is
    for name, target in LINKS.items():
        (dev / name).symlink_to(target)
    for name in ("pts", "shm"):
        (dev / name).mkdir()
    mount("devpts", dev / "pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")


def _become(spec: dict[str, Any]) -> None:
    """The container's user, with no more capabilities than it may have."""
    for number in spec["dropped_capabilities"]:
        _libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)  # one that the kernel does not know is dropped already
    os.setgroups(spec["groups"])
    os.setresgid(spec["gid"], spec["gid"], spec["gid"])
    os.setresuid(spec["uid"], spec["uid"], spec["uid"])
    if spec["no_new_privileges"]:
        _call("prctl", _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    die_with_parent()  # the kernel forgot it when the user changed


def die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _execute(spec: dict[str, Any]) -> NoReturn:
    os.umask(0o022)
    os.chdir(spec["working_dir"])
    for number in (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT):  # Python has changed them
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(spec["command"][0], spec["command"], spec["env"])


def execute(spec: dict[str, Any], fd: int) -> NoReturn:
    """Run a command beside the container's process `spec["pid"]` and exit as it does."""
    join(spec["pid"], "net", "uts", "ipc", "pid", "mnt")
    child = os.fork()  # only a child is in the PID namespace
    if child == 0:
        try:
            die_with_parent()
            _become(spec)
            _execute(spec)
        except BaseException as error:
            print(f"{spec['command'][0]}: {error}", file=sys.stderr, flush=True)
            os._exit(126)
    os.close(fd)
    _exit_as(child)


def _exit_as(child: int) -> NoReturn:
    """128 + N where a signal N has ended it."""
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def _say(fd: int, what: dict[str, Any]) -> None:
    os.write(fd, json.dumps(what).encode() + b"\n")


def main(kind: str, spec_file: str, fd_text: str) -> None:
    fd = int(fd_text)
    os.set_inheritable(fd, False)  # closed when the container's process takes over
    spec = json.loads(Path(spec_file).read_text())
    try:
        {"sandbox": sandbox, "run": run, "exec": execute}[kind](spec, fd)
    except Exception as error:
        with contextlib.suppress(OSError):
            _say(fd, {"error": str(error)})
        os._exit(START_FAILED)


if __name__ == "__main__":
    main(*sys.argv[1:])
