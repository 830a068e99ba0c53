"""Debian's docker-registry on loopback; its data stays in a folder when it ends."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from common.processes import Processes, free_ports, wait_for
from common.settings import SettingsError

START_SECONDS = 20.0


@contextmanager
def serve(folder: Path, *, password_file: Path | None = None) -> Iterator[str]:
    """`127.0.0.1:PORT` of a registry that keeps its data in `folder`/data, until the block ends.

    Several may serve one folder, for instance one inside and one outside of a network namespace. `password_file`:
    by htpasswd, with bcrypt; anybody may push and pull without one. Raises `SettingsError` where docker-registry is
    missing or does not start.
    """
    binary = shutil.which("docker-registry")
    if binary is None:
        raise SettingsError(["docker-registry: not on PATH: install the Debian package docker-registry"])
    folder.mkdir(parents=True, exist_ok=True)
    port = _port(folder / "port")
    host = f"127.0.0.1:{port}"
    settings: dict[str, object] = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder.resolve() / "data")}},
        "http": {"addr": host, "secret": secrets.token_hex(16)},
    }
    if password_file:
        settings["auth"] = {"htpasswd": {"realm": "registry", "path": str(password_file)}}
    with tempfile.TemporaryDirectory(dir=folder) as own, Processes() as processes:
        config, log = Path(own) / "config.yml", Path(own) / "log"
        config.write_text(json.dumps(settings))  # JSON is YAML
        process = processes.start([binary, "serve", str(config)], log=log)

        def alive() -> None:
            if process.poll() is not None:
                raise SettingsError([f"docker-registry ended with {process.returncode}: {log.read_text()[-2000:]}"])

        wait_for(lambda: _answers(f"http://{host}/v2/"), START_SECONDS, "docker-registry", alive)
        yield host


def _port(file: Path) -> int:
    """The port of the last time, if nobody has it now: who pushes remembers by address what is there already."""
    if file.exists():
        port = int(file.read_text())
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    (port,) = free_ports(1)
    file.write_text(str(port))
    return port


def _answers(address: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach our loopback
    try:
        opener.open(address, timeout=2).close()
    except urllib.error.HTTPError:
        return True  # asks for a sign-in: it is up
    except OSError:
        return False
    return True
