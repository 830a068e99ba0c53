"""The process that a running local cloud lives in: `python -m localcloud.live.daemon FOLDER IMAGES`.

It holds what needs the machine's own network (the image builder, Blob, registry, the stand-ins for Azure) and the half
in namespaces (`inside`), and ends with that. SIGTERM ends it in order; killed outright, it takes all along too.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from common.files import private, write_atomic
from common.processes import Processes, free_ports, python, wait_for
from localcloud import azurite, registry
from localcloud.api import Api
from localcloud.autoscaler import Autoscaler
from localcloud.azure import arm
from localcloud.azure.world import World
from localcloud.base import python_image
from localcloud.builder import Builder
from localcloud.cloud import claim, environment
from localcloud.control_plane import choose_port
from localcloud.front import Front
from localcloud.images import Store
from localcloud.live.places import DAEMON_FILE, sockets
from localcloud.live.relay import Relay
from localcloud.tools import ROOT

INSIDE_SECONDS = 120.0  # some ten on an idle machine
MODELS = {"drydock/tiny": "rehearsal/base"}


def main(folder: Path, images: Path) -> None:
    private(folder)
    places, world = sockets(folder), World(folder / "azure")
    for stale in (folder / DAEMON_FILE, folder / "inside.json"):
        stale.unlink(missing_ok=True)
    with contextlib.ExitStack() as opened:
        claim(folder, opened)
        opened.callback((folder / DAEMON_FILE).unlink, missing_ok=True)
        store = Store(images)
        opened.callback(store.close)
        if not world.folder.exists():  # a new Azure has nothing in its registries; images are kept as a cache
            shutil.rmtree(images / "registry/data/docker/registry/v2/repositories/adapters", ignore_errors=True)
        processes = opened.enter_context(Processes())
        blobs = azurite.start(processes, folder / "blobs", folder / "logs" / "azurite.log")
        host = opened.enter_context(registry.serve(images / "registry"))
        builder = Builder(store, host, python_image)
        runs = opened.enter_context(contextlib.closing(arm.serve(folder, world.folder, builder=builder)))
        front = opened.enter_context(
            contextlib.closing(
                Front(
                    folder, world, issuer_key=folder / "service-accounts.key", blobs=blobs, account_key=azurite.KEY,
                    registry=host, models={name: ROOT / path for name, path in MODELS.items()},
                )
            )
        )  # fmt: skip
        port, (router,) = choose_port(folder), free_ports(1)
        for listen, target in (
            (("127.0.0.1", port), places["api"]),
            (places["azure"], ("127.0.0.1", front.server_port)),
            (("127.0.0.1", router), places["router"]),
        ):
            opened.enter_context(contextlib.closing(Relay(listen, target)))
        inside = processes.start(
            [
                *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
                "dumb-init",  # reaps what containers leave
                *python("localcloud.live.inside", folder, images, str(port)),
            ],
            log=folder / "logs" / "inside.log",
            at_our_death=signal.SIGKILL,
        )
        _wait(inside, folder)
        access = json.loads((folder / "cluster.json").read_text())
        api = opened.enter_context(Api(access["server"], access["token"], Path(access["ca_file"])))
        opened.enter_context(Autoscaler(api, world, kubelet="runner"))
        up = {
            "pid": os.getpid(),
            "environment": environment(folder, world.folder, blobs, runs.url),
            "registry": f"http://{host}",
            "router": f"http://127.0.0.1:{router}",
        }
        write_atomic(folder / DAEMON_FILE, json.dumps(up, indent=2))
        code = inside.wait()
        sys.exit(f"the cluster ended with {code}: {_end(folder)}")


def _wait(inside: subprocess.Popen[bytes], folder: Path) -> None:
    def check() -> None:
        if inside.poll() is not None:
            sys.exit(f"the cluster ended with {inside.returncode}: {_end(folder)}")

    wait_for((folder / "inside.json").exists, INSIDE_SECONDS, "the cluster", check)


def _end(folder: Path) -> str:
    return (folder / "logs" / "inside.log").read_text(errors="replace")[-2000:]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us, who then ends us
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
