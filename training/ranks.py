"""The processes of one run, and what they share: one a GPU, each with its share of every step's rows.

What a step is does not depend on their number: batch x accumulation rows, and the sum of the gradients of all processes
is the gradient, because the loss is a sum over the answer tokens of the step. So no averaging and no
DistributedDataParallel: one all-reduce a step, of the adapter's gradients alone. The numbers differ in the order of
floating-point sums, and in the draws of dropout. The same number of processes gives the same bytes on a CPU.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from common import exits
from common.settings import SettingsError
from training.launch import is_rank

PATIENCE = timedelta(minutes=30)
"""How long processes wait for the first, which fetches, digests and encodes alone. A process that died is not waited
for: its connections close, and the launcher ends the others."""

WITHOUT_LIMIT = timedelta(days=30)
"""For the others to come at all where they may come late, such as pods that wait for a GPU: the longest deadline that a
Job may have (`infra.settings.Tuning`)."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run; alone, it shares with nobody and every method is as good as free."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this one reads, writes and speaks for all."""
        return self.rank == 0

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` returns in the first process, in all of them; the others do not call it.

        What it raises is raised in the first alone. The others end quietly with the exit code that goes with it.
        """
        if self.world == 1:
            return make()
        told: list[Any] = [None, None]
        error: Exception | None = None
        if self.first:
            try:
                told = [make(), None]
            except Exception as problem:
                error = problem
                told = [None, exits.INPUT if isinstance(problem, SettingsError) else exits.FAILED]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if error is not None:
            raise error
        if told[1] is not None:
            raise SystemExit(told[1])
        value: Value = told[0]
        return value

    def copy_from_first(self, tensors: Iterable[torch.Tensor]) -> None:
        """Make `tensors` of all processes what they are in the first, in place."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor.detach(), src=0)

    def add_up(self, weights: Sequence[torch.Tensor], values: torch.Tensor) -> torch.Tensor:
        """Sum the gradients of `weights` over all processes in place, and return the sum of `values` (flat, fp32).

        A weight without gradient here, in a process that had no rows, counts as zeros.
        """
        if self.world == 1:
            return values
        grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in weights]
        sums = torch.cat([*(grad.flatten() for grad in grads), values])
        dist.all_reduce(sums)
        parts = torch.split(sums, [*(grad.numel() for grad in grads), values.numel()])
        for weight, part in zip(weights, parts, strict=False):
            weight.grad = part.view_as(weight)
        return parts[-1]

    def any(self, *flags: bool) -> list[bool]:
        """Each flag as true where it is true in any process."""
        if self.world == 1:
            return list(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return [bool(vote) for vote in votes]

    def gather(self, value: Value) -> list[Value]:
        """The `value` of every process, by rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def gpu_memory(self) -> int | None:
        """The most bytes that this process has had allocated on its GPU; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None

    def seed(self, seed: int, step: int) -> None:
        """Begin the random numbers of this process (dropout) anew, by seed, rank and step."""
        digest = hashlib.sha256(f"{seed}/{self.rank}/{step}".encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def random_state(self) -> dict[str, torch.Tensor | None]:
        """The state of the generators that the loop draws from (dropout); the row order needs none."""
        gpu = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return {"cpu": torch.get_rng_state(), "cuda": gpu}

    def set_random_state(self, state: dict[str, torch.Tensor | None]) -> None:
        assert state["cpu"] is not None
        torch.set_rng_state(state["cpu"])
        if state["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)


@contextlib.contextmanager
def join(*, alone: bool = False, come: timedelta = PATIENCE) -> Iterator[Ranks]:
    """The processes of this run by torchrun's environment variables; without them or if `alone`, this one alone.

    They are waited for as long as `come` says. Gradients go by NCCL between GPUs; all else, and what is on a CPU, by
    gloo. Raises `SettingsError` when this process would have no GPU of its own.
    """
    rank, world, local = 0, 1, 0
    if is_rank() and not alone:
        rank, world, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    device = torch.device("cpu")
    if gpus := torch.cuda.device_count():
        if local >= gpus:
            raise SettingsError([f"--processes: this machine has {gpus} GPUs; one process a GPU, so at most {gpus}"])
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(rank, world, device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store, _, _ = next(rendezvous("env://", rank, world, timeout=come))
    store.set_timeout(PATIENCE)
    store = dist.PrefixStore("drydock", store)  # type: ignore[attr-defined]  # torchrun keeps its own keys there
    dist.init_process_group(backend, store=store, timeout=PATIENCE, rank=rank, world_size=world)
    try:
        yield Ranks(rank, world, device)
    finally:
        dist.destroy_process_group()


def deal(sizes: Sequence[int], shares: int) -> list[list[int]]:
    """Distribute items of `sizes` over `shares`, as evenly as largest-first finds; their indices, in each by size.

    The outcome depends on the sizes and their order alone.
    """
    dealt: list[list[int]] = [[] for _ in range(shares)]
    loads = [0] * shares
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        least = loads.index(min(loads))
        dealt[least].append(index)
        loads[least] += sizes[index]
    return dealt
