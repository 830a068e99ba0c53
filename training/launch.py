"""Starts the processes of one run on this node, one a GPU, and ends with the exit code that says most.

Each gets torchrun's environment (RANK, WORLD_SIZE, ...), and torchrun can start them as well:

    torchrun --nproc-per-node 8 -m training tune --spec ... --out ...

A Job needs two things that torchrun 2.13 does not do: an exit code of a worker that goes through (torchrun ends with 1
whatever the worker ended with, and `podFailurePolicy` could not tell a wrong dataset from a lost node), and time after
SIGTERM (torchrun kills the workers 30 s after it, unless told by --shutdown-timeout; a checkpoint and its copy in
Blob may take longer, and how long is the pod's grace period to say).
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from types import FrameType

from common import exits
from common.processes import Processes, free_ports
from common.settings import SettingsError

log = logging.getLogger(__name__)

ALONE_SECONDS = 5.0
"""What the other processes get to end by themselves, with their own message, after one of them failed."""

LOOPBACK = "127.0.0.1"


def is_rank() -> bool:
    """Whether this process is one of several of a run already: started by `launch`, torchrun or the like."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_first() -> bool:
    """Whether this process is the one that reads, writes and speaks for all of its run."""
    return not is_rank() or os.environ["RANK"] == "0"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that `launched` reads."""
    parser.add_argument(
        "--processes", default="1", metavar="N|auto", help="GPUs of this machine that tune together [%(default)s]"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that tune together [%(default)s]")
    parser.add_argument("--node-rank", type=int, default=0, metavar="I", help="this one, from 0; 0 writes --out")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="of machine 0, a free port: needed with --nodes")


def launched(arguments: argparse.Namespace) -> int | None:
    """The exit code of the run that `arguments` ask for, if it takes several processes; None in one of them."""
    if is_rank():
        return None
    processes = _processes(arguments.processes)
    if processes == 1 and arguments.nodes == 1:
        return None
    return launch(
        [sys.executable, "-m", "training", *arguments.argv], processes,
        nodes=arguments.nodes, node_rank=arguments.node_rank, rendezvous=arguments.rendezvous,
    )  # fmt: skip


def _processes(wish: str) -> int:
    if wish == "auto":
        import torch  # seconds: only who asks for it waits

        return max(1, torch.cuda.device_count())
    if not wish.isdecimal() or int(wish) < 1:
        raise SettingsError([f"--processes: should be a number from 1, or auto; found {wish}"])
    return int(wish)


def launch(
    command: Sequence[str], processes: int, *, nodes: int = 1, node_rank: int = 0, rendezvous: str | None = None
) -> int:
    """Run `command` `processes` times on this node, one of `nodes`, to the end of all; their `worst` exit code.

    `rendezvous` is HOST:PORT of node 0, where the first process listens; one node needs none. SIGTERM is passed on, and
    then waited for without limit. When one fails, the others are ended after `ALONE_SECONDS`: some would wait for it
    for ever.
    """
    if nodes > 1 and rendezvous is None:
        raise SettingsError(["--rendezvous: HOST:PORT of node 0 is needed with --nodes above 1"])
    if not 0 <= node_rank < nodes:
        raise SettingsError([f"--node-rank: should be from 0 to {nodes - 1} with --nodes {nodes}; found {node_rank}"])
    host, _, port = (rendezvous or f"{LOOPBACK}:{free_ports(1)[0]}").rpartition(":")
    if not host or not port.isdecimal():
        raise SettingsError([f"--rendezvous: should be HOST:PORT, found {rendezvous}"])
    cores = len(os.sched_getaffinity(0))
    shared = {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(nodes * processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
    }
    with Processes() as children:
        running = [
            children.start(
                command,
                environment=shared | {"RANK": str(node_rank * processes + local), "LOCAL_RANK": str(local)},
            )
            for local in range(processes)
        ]

        def forward(number: int, frame: FrameType | None) -> None:
            for process in running:
                if process.poll() is None:
                    process.send_signal(number)

        before = signal.signal(signal.SIGTERM, forward)
        try:
            failed_at: float | None = None
            while any(process.poll() is None for process in running):
                ended = [code for process in running if (code := process.poll()) is not None]
                if failed_at is None and worst(ended) not in (exits.OK, exits.TERMINATED):
                    failed_at = time.monotonic()
                if failed_at is not None and time.monotonic() - failed_at > ALONE_SECONDS:
                    for process in running:
                        process.kill()
                time.sleep(0.1)
        finally:
            signal.signal(signal.SIGTERM, before)
        codes = [process.wait() for process in running]
    code = worst(codes)
    if code == exits.FAILED:
        log.error("the processes ended with the codes %s (-9: killed, perhaps for memory)", ", ".join(map(str, codes)))
    return code


def worst(codes: Iterable[int]) -> int:
    """One exit code for all: INPUT before other failures, which may only follow from it, and TERMINATED before OK.

    A process that SIGTERM ended before it could note the signal counts as TERMINATED.
    """
    own = {exits.TERMINATED if code == -signal.SIGTERM else code for code in codes}
    if exits.INPUT in own:
        return exits.INPUT
    if own - {exits.OK, exits.TERMINATED}:
        return exits.FAILED
    return exits.TERMINATED if exits.TERMINATED in own else exits.OK
