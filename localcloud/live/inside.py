"""The half of a running local cloud that is in namespaces of its own: control plane, kube-proxy, pod runner, pods.

`python -m localcloud.live.inside FOLDER STORE`, started by the daemon below `unshare`: when that ends, the kernel takes
all of it away, its interfaces, mounts and nft tables too.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import threading
from pathlib import Path

from common.files import write_atomic
from common.processes import Processes
from localcloud import registry
from localcloud.api import Api
from localcloud.azure.world import World
from localcloud.control_plane import POD_CIDR, ControlPlane
from localcloud.front import hosts
from localcloud.images import BuildahImages, Store
from localcloud.live.dress import Dresser
from localcloud.live.places import API_ADDRESS, AZURE_ADDRESS, OWN, REGISTRY_ADDRESS, sockets
from localcloud.live.relay import Relay
from localcloud.live.sight import ROUTER, SERVING
from localcloud.runner.runner import Runner
from localcloud.tools import locate

KUBELET_PORT = 10250  # where every kubelet listens
FIRST_SERVICE = "10.0.0.1"  # `kubernetes`: the first of the range


def main(folder: Path, images: Path, port: int) -> None:
    """Serve until killed; `inside.json` in `folder` says that all is up."""
    tools, places = locate(), sockets(folder)
    _network()
    with contextlib.ExitStack() as opened:
        processes = opened.enter_context(Processes())
        host = opened.enter_context(registry.serve(images / "registry"))
        plane = opened.enter_context(
            ControlPlane(folder, tools, address=API_ADDRESS, port=port, runner=True, autoscaler=True)
        )
        for listen, target in (
            (places["api"], ("127.0.0.1", port)),
            ((API_ADDRESS, port), ("127.0.0.1", port)),
            ((AZURE_ADDRESS, 443), places["azure"]),
            ((REGISTRY_ADDRESS, 443), places["azure"]),
        ):
            opened.enter_context(contextlib.closing(Relay(listen, target)))
        processes.start(
            [
                str(tools.kube_proxy),
                f"--kubeconfig={folder / 'kubeconfig'}",
                "--proxy-mode=nftables",
                f"--cluster-cidr={POD_CIDR}",
                "--hostname-override=drydock-local",
                f"--bind-address={OWN}",
                "--healthz-bind-address=127.0.0.1:10256",
                "--metrics-bind-address=127.0.0.1:10249",
                "--conntrack-max-per-core=0",  # the machine's, which is not ours to set
            ],
            log=folder / "logs" / "kube-proxy.log",
        )
        api = opened.enter_context(plane.client())
        opened.enter_context(contextlib.closing(Relay(places["router"], lambda: _router(api))))
        world = World(folder / "azure")
        dress = Dresser(api, folder / "runner" / "nodes", folder / "front" / "ca-bundle.crt", lambda: hosts(world))
        opened.enter_context(
            Runner(
                api, BuildahImages(Store(images), host), folder / "runner", service_host=FIRST_SERVICE,
                dress=dress, kubelet_port=KUBELET_PORT,
            )
        )  # fmt: skip
        write_atomic(folder / "inside.json", "{}")
        threading.Event().wait()


def _router(api: Api) -> tuple[str, int]:
    """The router's Service. Raises OSError while there is none."""
    service = api.find(f"/api/v1/namespaces/{SERVING}/services/{ROUTER}")
    if service is None:
        raise ConnectionRefusedError(f"no Service {ROUTER} yet")
    return service["spec"]["clusterIP"], service["spec"]["ports"][0]["port"]


def _network() -> None:
    """Loopback, our own addresses and a default route, without which kube-proxy does not work."""
    lines = ["link set lo up", "link add outside type bridge", "link set outside up"]
    lines += [f"addr add {address}/32 dev outside" for address in (API_ADDRESS, AZURE_ADDRESS, OWN, REGISTRY_ADDRESS)]
    lines += [f"route add default dev outside src {OWN}"]
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
