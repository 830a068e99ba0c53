"""Starts the processes of one run on this node, one a GPU, and ends with the exit code that says most.

Each gets torchrun's environment (RANK, WORLD_SIZE, ...), and torchrun can start them as well:

    torchrun --nproc-per-node 8 -m training tune --spec ... --out ...

A Job needs two things that torchrun 2.13 does not do: an exit code of a worker that goes through (torchrun ends with 1
whatever the worker ended with, and `podFailurePolicy` could not tell a wrong dataset from a lost node), and time after
SIGTERM (torchrun kills the workers 30 s after it, unless told by --shutdown-timeout; a checkpoint and its copy in
Blob may take longer, and how long is the pod's grace period to say).

Of several machines each is started by itself, and with --rejoin none has to be started again because another one went:

    another was told to stop           all stop after the same step, with a checkpoint, and join again at once
    one is lost, or fails              machine 0 fails and is to be started again, by whoever counts failures (a Job);
                                       the others see their connections close and join again
    nothing is left to tune            machine 0 does not wait for the others; they end when they see the run's end
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType

from common import exits
from common.processes import Processes, free_ports
from common.settings import SettingsError
from common.sigterm import Sigterm

log = logging.getLogger(__name__)

ALONE_SECONDS = 5.0
"""What the other processes get to end by themselves, with their own message, after one of them failed."""

SOON_SECONDS = 120.0
SOON_TIMES = 5
"""So often in a row may a machine fail within so short a time before it no longer joins again: the fault is its own."""

LOOPBACK = "127.0.0.1"
INDEX = "JOB_COMPLETION_INDEX"
"""Kubernetes tells each pod of an Indexed Job its number in this variable."""


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
    parser.add_argument(
        "--node-rank", type=int, metavar="I", help=f"this one, from 0; 0 writes --out [${INDEX}, otherwise 0]"
    )
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="of machine 0, a free port: needed with --nodes")
    parser.add_argument(
        "--rejoin",
        action="store_true",
        help="when another machine stops or is lost, join again and go on; wait for the others without limit",
    )


def launched(arguments: argparse.Namespace) -> int | None:
    """The exit code of the run that `arguments` ask for, if it takes several processes; None in one of them."""
    if is_rank():
        return None
    processes = _processes(arguments.processes)
    if processes == 1 and arguments.nodes == 1:
        return None
    if arguments.rejoin and arguments.fresh:
        raise SettingsError(["--fresh: not with --rejoin, where who joins again would discard what was just tuned"])
    node_rank = arguments.node_rank
    if node_rank is None:
        node_rank = _index() if arguments.nodes > 1 else 0  # one machine may be a pod of an Indexed Job of its own
    return launch(
        [sys.executable, "-m", "training", *arguments.argv], processes,
        nodes=arguments.nodes, node_rank=node_rank, rendezvous=arguments.rendezvous, rejoin=arguments.rejoin,
    )  # fmt: skip


def _index() -> int:
    text = os.environ.get(INDEX, "0")
    if not text.isdecimal():
        raise SettingsError([f"{INDEX}: should be a number from 0, found {text}; or give --node-rank"])
    return int(text)


def _processes(wish: str) -> int:
    if wish == "auto":
        import torch  # seconds: only who asks for it waits

        return max(1, torch.cuda.device_count())
    if not wish.isdecimal() or int(wish) < 1:
        raise SettingsError([f"--processes: should be a number from 1, or auto; found {wish}"])
    return int(wish)


def launch(
    command: Sequence[str],
    processes: int,
    *,
    nodes: int = 1,
    node_rank: int = 0,
    rendezvous: str | None = None,
    rejoin: bool = False,
) -> int:
    """Run `command` `processes` times on this node, one of `nodes`, to the end of all; one exit code for them.

    `rendezvous` is HOST:PORT of node 0, where the first process listens; one node needs none. SIGTERM is passed on, and
    then waited for without limit. When one fails, the others are ended after `ALONE_SECONDS`: some would wait for it
    for ever. With `rejoin` they are run again when the end came from another node (see above).
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
    ranks = [
        shared | {"RANK": str(node_rank * processes + local), "LOCAL_RANK": str(local)} for local in range(processes)
    ]
    soon = 0
    with _Asked() as asked:
        while True:
            started = time.monotonic()
            code = _run(command, ranks, asked)
            failed = code == exits.FAILED
            soon = soon + 1 if failed and time.monotonic() - started < SOON_SECONDS else 0
            # A failure of node 0 is for others to count; each of another node makes it fail too, so they are counted.
            again = code == exits.TERMINATED or (failed and node_rank > 0 and soon < SOON_TIMES)
            if asked.came or not rejoin or not again:
                return code
            log.warning("the run ended before its end, by another machine as it seems: joining again")


class _Asked(Sigterm):
    """SIGTERM goes on to the processes `running` as well."""

    def __init__(self) -> None:
        super().__init__()
        self.running: list[subprocess.Popen[bytes]] = []

    def _note(self, number: int, frame: FrameType | None) -> None:
        super()._note(number, frame)
        self.forward()

    def forward(self) -> None:
        for process in self.running:
            if process.poll() is None:
                process.terminate()


def _run(command: Sequence[str], ranks: Sequence[Mapping[str, str]], asked: _Asked) -> int:
    """Run `command` once with each environment of `ranks` to the end of all; one exit code for them."""
    has_first = ranks[0]["RANK"] == "0"
    with Processes() as children:
        asked.running = running = [children.start(command, environment=environment) for environment in ranks]
        if asked.came:  # before there was one that it could be passed on to
            asked.forward()
        ending_at: float | None = None
        while any(process.poll() is None for process in running):
            ended = [code for process in running if (code := process.poll()) is not None]
            over = has_first and running[0].poll() == exits.OK
            if ending_at is None and (over or worst(ended) not in (exits.OK, exits.TERMINATED)):
                ending_at = time.monotonic() + ALONE_SECONDS
            if ending_at is not None and time.monotonic() > ending_at:
                for process in running:
                    process.kill()
            time.sleep(0.1)
        codes = [process.wait() for process in running]
    if has_first and codes[0] == exits.OK:  # what the first has finished is finished, whether others saw it or not
        return exits.OK
    code = worst(codes)
    if code == exits.FAILED and asked.came and -signal.SIGTERM in codes:
        return exits.TERMINATED  # one had not begun, and SIGTERM ended it at once: the others only lost it
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
