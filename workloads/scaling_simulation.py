"""How an environment's scaling would follow a load: replicas, queue and time to first token over hours, in seconds.

    python -m workloads.scaling_simulation prod --load day --rate 12
    python -m workloads.scaling_simulation prod --trace AzureLLMInferenceTrace_conv.csv --scale 3

The ScaledObject is the one that `pulumi up` declares; KEDA and the HPA act as their code does, in
workloads/autoscaler.py. The replicas are a model: a decode step reads weights and KV cache from memory and a prompt is
computed, by the GPU's figures; what the GPUs of one replica tell each other takes no time in it. It tells whether the
policy is too slow, too eager or flaps, not what a request costs.
Loads are synthetic and seeded, or a recorded one in the format of Azure's public traces (columns TIMESTAMP,
ContextTokens, GeneratedTokens). Exit codes: 0 done, 2 bad arguments or settings.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import itertools
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from common import cli, exits
from common.settings import SettingsError
from infra import offline
from infra.fit import GIB, kv_token_bytes, serving_fit, serving_load
from infra.settings import Environment
from serving.spec import Tier
from workloads.autoscaler import SYNC_SECONDS, Autoscaler
from workloads.scaling import IDLE_SECONDS, MOST_AT_ONCE, POLL_SECONDS, scaled_object, start_seconds

EPILOG = """
examples:
  python -m workloads.scaling_simulation prod --load day --rate 12
  python -m workloads.scaling_simulation dev --load step --rate 6 --hours 3 --start-seconds 400
"""

MEMORY_AND_COMPUTE = {
    "T4": (320, 65),
    "A10": (600, 125),
    "1/2 A10": (300, 62),
    "1/3 A10": (200, 42),
    "1/6 A10": (100, 21),
    "A100 40GB": (1555, 312),
    "A100 80GB": (1935, 312),
    "H100 80GB": (3350, 989),
    "H100 NVL": (3938, 835),
    "H200": (4800, 989),
}
"""GB/s and dense 16-bit TFLOPS by GPU, from NVIDIA's data sheets; the A100 80GB as PCIe card, slices of an A10 by
their share."""
MEMORY_SHARE = 0.65
COMPUTE_SHARE = 0.5
"""What of these vLLM gets out of the card. Assumptions: with them an 8B model on an A100 takes 13 ms a step alone."""
SEEN_AFTER = 2
"""Scrapes until a value is what a query finds: managed Prometheus takes some seconds to ingest. An assumption."""


@dataclass(frozen=True)
class Speed:
    """What one replica does."""

    slots: int  # max_num_seqs
    kv_tokens: int  # of its KV cache
    step_seconds: float  # of a decode step, for the weights
    step_seconds_per_token: float  # of a decode step, for each token in the KV cache
    prefill_seconds_per_token: float
    queue: int = Tier().waiting  # requests, from which on it answers 429


def speed(env: Environment) -> Speed:
    """A replica of this environment by the figures of its GPU. Raises SettingsError on device cpu."""
    serving, model, size = env.serving, env.base.figures, env.pools[env.serving.pool].sku
    if serving.device != "cuda":
        raise SettingsError(["serving.device: cpu has no figures here: simulate an environment with GPUs"])
    load = serving_load(serving, len(env.adapters), env.max_lora_rank)
    fit = serving_fit(model, size, load)
    width = 4 if serving.dtype == "float32" else 2
    token_bytes = kv_token_bytes(model, width, serving.gpus)
    others = sum(term.gib for term in fit.terms if term.name != "KV cache")
    memory, compute = MEMORY_AND_COMPUTE[size.gpu.name]
    bandwidth = memory * 1e9 * MEMORY_SHARE
    return Speed(
        slots=serving.max_num_seqs,
        kv_tokens=int((fit.available_gib - others) * GIB / token_bytes),
        step_seconds=model.parameters * width / serving.gpus / bandwidth,
        step_seconds_per_token=token_bytes / bandwidth,
        prefill_seconds_per_token=2 * model.parameters / (serving.gpus * compute * 1e12 * COMPUTE_SHARE),
    )


@dataclass(frozen=True)
class Request:
    """When it comes (seconds), and tokens of prompt and answer."""

    at: float
    prompt: int
    answer: int


class Replica:
    """vLLM as a queue with slots. All running requests get a token with each step, whose length follows from them."""

    def __init__(self, ready_at: float, speed: Speed) -> None:
        self.ready_at, self.speed = ready_at, speed
        self.waiting: deque[tuple[Request, bool]] = deque()  # and whether its answer had begun
        self._running: list[tuple[float, int, Request]] = []  # the token count at which it ends
        self._tokens = 0.0  # that each request would have which ran since the start
        self._held = 0.0  # tokens in the cache less those decoded since the start, for all of them
        self._prefill = 0.0  # seconds of prompts to compute, before which nothing is decoded
        self._numbers = itertools.count()

    @property
    def running(self) -> int:
        """Requests in slots."""
        return len(self._running)

    @property
    def load(self) -> int:
        """Requests in it, by which the router chooses."""
        return len(self._running) + len(self.waiting)

    @property
    def kv_used(self) -> float:
        """Tokens in the KV cache."""
        return self._held + len(self._running) * self._tokens

    def step(self, now: float, seconds: float) -> Iterator[tuple[float, float]]:
        """Compute for `seconds` up to `now`; of each answer that begins: when it was asked for, and seconds since."""
        speed = self.speed
        prefill = min(self._prefill, seconds)
        self._prefill -= prefill
        if self._running:
            each = speed.step_seconds + speed.step_seconds_per_token * self.kv_used
            self._tokens += (seconds - prefill) / each
            while self._running and self._running[0][0] <= self._tokens:
                end, _, request = heapq.heappop(self._running)
                self._held -= request.prompt + request.answer - end
            if not self._running:
                self._held = self._tokens = 0.0  # no sum of roundings over a day
            while self.kv_used > speed.kv_tokens and len(self._running) > 1:
                self._preempt()
        while self.waiting and len(self._running) < speed.slots:
            request, begun = self.waiting[0]
            if self._running and self.kv_used + request.prompt > speed.kv_tokens:
                break
            self.waiting.popleft()
            self._prefill += request.prompt * speed.prefill_seconds_per_token
            end = self._tokens + request.answer
            heapq.heappush(self._running, (end, next(self._numbers), request))
            self._held += request.prompt + request.answer - end
            if not begun:
                yield request.at, now - request.at + self._prefill

    def _preempt(self) -> None:
        """The youngest goes back to the head of the queue, and is computed again with what it had."""
        youngest = max(self._running, key=lambda item: item[1])
        self._running.remove(youngest)
        heapq.heapify(self._running)
        end, _, request = youngest
        left = max(1, math.ceil(end - self._tokens))
        self._held -= request.prompt + request.answer - end
        self.waiting.appendleft((Request(request.at, request.prompt + request.answer - left, left), True))


@dataclass(frozen=True)
class Row:
    """The pool at one time (seconds): replicas declared and ready, requests, the mean share of the KV cache in use."""

    at: float
    replicas: int
    ready: int
    running: int
    waiting: int
    kv_cache: float


@dataclass
class Result:
    """What became of a load. `first_tokens`: when each answer was asked for, and its seconds to the first token."""

    rows: list[Row] = field(default_factory=list)
    first_tokens: list[tuple[float, float]] = field(default_factory=list)
    refused: int = 0
    """429: the queues were full."""
    unplaced: int = 0
    """503: no replica was there."""

    @property
    def changes(self) -> list[tuple[float, int, int]]:
        """When the number of replicas changed, from and to."""
        return [
            (later.at, earlier.replicas, later.replicas)
            for earlier, later in itertools.pairwise(self.rows)
            if earlier.replicas != later.replicas
        ]

    def flaps(self, seconds: float) -> list[tuple[float, float]]:
        """Times of a scale-down and of the scale-up that followed it within `seconds`."""
        return [
            (down, up)
            for (down, before, after), (up, low, high) in itertools.pairwise(self.changes)
            if after < before and high > low and up - down <= seconds
        ]

    def first_token(self, share: float, since: float = 0, until: float = math.inf) -> float:
        """Quantile of the seconds to the first token, of what was asked for in that time; nan without any."""
        seconds = sorted(value for at, value in self.first_tokens if since <= at < until)
        return seconds[min(len(seconds) - 1, int(share * len(seconds)))] if seconds else math.nan

    @property
    def replica_hours(self) -> float:
        """What is paid for."""
        return sum(row.replicas for row in self.rows) * SYNC_SECONDS / 3600


def simulate(
    spec: Mapping[str, Any],
    speed: Speed,
    start: float,
    requests: Iterable[Request],
    seconds: float,
    *,
    blind: tuple[float, float] = (0, 0),
    seed: int = 0,
) -> Result:
    """`seconds` of `requests`, in the order in which they come, on replicas that begin with the minimum of them.

    `spec`: of the ScaledObject; `start`: seconds until a new replica answers; `blind`: a time without any metrics;
    `seed`: of the router's two random choices, of which it takes the less loaded (power_of_two).
    """
    chance, result = random.Random(seed), Result()
    scaler = Autoscaler(spec, spec["minReplicaCount"])
    replicas = [Replica(0, speed) for _ in range(scaler.replicas)]
    leaving: list[Replica] = []  # what was taken away ends its answers
    scrapes: deque[dict[str, float | None]] = deque(maxlen=SEEN_AFTER + 1)
    target = next(int(item["metadata"]["threshold"]) for item in spec["triggers"] if item["name"] == "waiting")
    asked_at = -math.inf
    queue = iter(requests)
    following = next(queue, None)
    ready = list(replicas)

    def place(request: Request, begun: bool) -> None:
        if not ready:
            result.unplaced += 1
            return
        chosen = min((chance.choice(ready), chance.choice(ready)), key=lambda replica: replica.load)
        if len(chosen.waiting) >= speed.queue:
            result.refused += 1
        else:
            chosen.waiting.append((request, begun))

    for now in range(int(seconds)):
        ready = [replica for replica in replicas if replica.ready_at <= now]
        while following and following.at <= now:
            asked_at = now
            place(following, False)
            following = next(queue, None)
        for replica in (*ready, *leaving):
            result.first_tokens += replica.step(now, 1)
        if now % SYNC_SECONDS:
            continue
        leaving = [replica for replica in leaving if replica.load]
        seen = [*ready, *leaving]
        waiting, running = sum(len(each.waiting) for each in seen), sum(each.running for each in seen)
        kv_cache = sum(each.kv_used for each in seen) / speed.kv_tokens
        result.rows.append(
            Row(now, scaler.replicas, len(ready), running, waiting, kv_cache / len(seen) if seen else 0.0)
        )
        # What the queries of workloads/scaling.py find.
        values: dict[str, float | None] = {"waiting": None, "running": None, "kv-cache": None}
        if seen:
            most = MOST_AT_ONCE * target * len(seen)
            values = {"waiting": min(waiting, most), "running": running, "kv-cache": kv_cache}
        scrapes.append({**values, "asked": float(now - asked_at <= IDLE_SECONDS)})
        known: Mapping[str, float | None] = scrapes[0]
        if blind[0] <= now < blind[1]:
            known = dict.fromkeys(known)
        before = scaler.replicas
        if now % POLL_SECONDS == 0:
            scaler.poll(now, known)
        scaler.sync(now, known)
        for _ in range(scaler.replicas - before):
            replicas.append(Replica(now + start, speed))
        for _ in range(before - scaler.replicas):
            youngest = max(
                replicas, key=lambda replica: replica.ready_at
            )  # as the ReplicaSet: unready, then young ones
            replicas.remove(youngest)
            leaving.append(youngest)
            ready = [replica for replica in ready if replica is not youngest]
            moved, youngest.waiting = youngest.waiting, deque()
            for request, begun in moved:  # the router tries them elsewhere
                place(request, begun)
    return result


Rate = Callable[[float], float]


def constant(rate: float, seconds: float) -> Rate:
    """The same all the time."""
    return lambda at: rate


def day(rate: float, seconds: float) -> Rate:
    """A hump from a fifth of `rate` to all of it and back, in `seconds`."""
    return lambda at: rate * (0.6 - 0.4 * math.cos(2 * math.pi * at / seconds))


def step(rate: float, seconds: float) -> Rate:
    """A fifth of `rate`, and all of it from the second quarter on."""
    return lambda at: rate if at >= seconds / 4 else rate / 5


def spike(rate: float, seconds: float) -> Rate:
    """A fifth of `rate`, and all of it for five minutes after the first quarter."""
    return lambda at: rate if 0 <= at - seconds / 4 < 300 else rate / 5


LOADS = {"constant": constant, "day": day, "step": step, "spike": spike}


def arrivals(
    rate: Rate, most: float, seconds: float, *, prompt: int = 1000, answer: int = 250, seed: int = 0
) -> Iterator[Request]:
    """Poisson arrivals at `rate`, which is nowhere above `most`, with lognormal lengths around these means (sigma 0.8).

    Thinning: Lewis and Shedler 1979.
    """
    chance, at, sigma = random.Random(seed), 0.0, 0.8
    while (at := at + chance.expovariate(most)) < seconds:
        if chance.random() * most <= rate(at):
            lengths = (mean * math.exp(chance.gauss(0, sigma) - sigma**2 / 2) for mean in (prompt, answer))
            yield Request(at, *(max(1, round(length)) for length in lengths))


def recorded(file: Path, scale: int = 1, seed: int = 0) -> list[Request]:
    """The requests of a trace, each `scale` times within a minute. Raises SettingsError, told by line."""
    chance, found, first = random.Random(seed), [], None
    try:
        with file.open(newline="", encoding="utf-8-sig") as text:
            for row in csv.DictReader(text):
                at = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
                first = at if first is None else first
                size = max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))
                found += [Request(at - first + (chance.uniform(0, 60) if n else 0), *size) for n in range(scale)]
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError([f"{file}: cannot be read: {error}"]) from None
    except (KeyError, TypeError, ValueError) as error:
        raise SettingsError(
            [f"{file}:{len(found) // scale + 2}: needs TIMESTAMP,ContextTokens,GeneratedTokens: {error!r}"]
        ) from None
    if not found:
        raise SettingsError([f"{file}: no requests in it"])
    return sorted(found, key=lambda request: request.at)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m workloads.scaling_simulation",
        description=__doc__.partition("\n")[0],
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stack", metavar="STACK", help="whose settings are in Pulumi.STACK.yaml, such as prod")
    parser.add_argument("--load", choices=LOADS, default="day", help="its shape (day)")
    parser.add_argument("--rate", type=float, default=10, help="requests a second at its height (10)")
    parser.add_argument("--hours", type=float, default=24, help="its length (24)")
    parser.add_argument("--prompt-tokens", type=int, default=1000, metavar="N", help="mean of a prompt (1000)")
    parser.add_argument("--answer-tokens", type=int, default=250, metavar="N", help="mean of an answer (250)")
    parser.add_argument("--seed", type=int, default=0, help="of chance (0)")
    parser.add_argument("--trace", type=Path, metavar="FILE", help="a recorded load in place of a synthetic one")
    parser.add_argument("--scale", type=int, default=1, metavar="N", help="each request of the trace N times (1)")
    parser.add_argument(
        "--start-seconds",
        type=float,
        metavar="N",
        help="until a new replica answers (the worst, for which scaling is set)",
    )
    return cli.run(_answer, parser.parse_args(arguments))


def _answer(arguments: argparse.Namespace) -> int:
    env = offline.read(arguments.stack).env
    if not env.serving.scales:
        raise SettingsError([f"serving.max_replicas: {env.serving.max_replicas} as min_replicas: nothing is scaled"])
    if min(arguments.rate, arguments.hours, arguments.scale, arguments.prompt_tokens, arguments.answer_tokens) <= 0:
        raise SettingsError(["--rate, --hours, --scale, --prompt-tokens, --answer-tokens: must be above 0"])
    parameters, seconds = env.base.figures.parameters, arguments.hours * 3600
    start = arguments.start_seconds if arguments.start_seconds is not None else start_seconds(parameters)
    requests: Iterable[Request]
    if arguments.trace:
        requests = recorded(arguments.trace, arguments.scale, arguments.seed)
        seconds = requests[-1].at + 3600
    else:
        requests = arrivals(
            LOADS[arguments.load](arguments.rate, seconds),
            arguments.rate,
            seconds,
            prompt=arguments.prompt_tokens,
            answer=arguments.answer_tokens,
            seed=arguments.seed,
        )
    spec = scaled_object(env.serving, parameters, query_endpoint="")
    found = simulate(spec, speed(env), start, requests, seconds, seed=arguments.seed)
    window = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]["scaleDown"]["stabilizationWindowSeconds"]
    print("\n".join(_table(found, start_seconds(parameters) + window)))
    return exits.OK


def _table(found: Result, soon: float) -> Iterator[str]:
    yield "    time  replicas  ready  running  waiting  KV cache  TTFT p95"
    every = max(1, len(found.rows) // 48)
    for row in found.rows[::every]:
        late = found.first_token(0.95, row.at, row.at + every * SYNC_SECONDS)
        told = "-" if math.isnan(late) else f"{late:.1f}s"
        yield (
            f"{_clock(row.at)}  {'#' * row.replicas:8}  {row.ready:5}  {row.running:7}  {row.waiting:7}  "
            f"{row.kv_cache:8.0%}  {told:>8}"
        )
    for at, before, after in found.changes:
        yield f"{_clock(at)}  {before} -> {after}"
    yield (
        f"{len(found.first_tokens)} answers, TTFT p50 {found.first_token(0.5):.2f} s, p95 "
        f"{found.first_token(0.95):.2f} s; {found.refused} refused (429), {found.unplaced} without a replica (503); "
        f"{found.replica_hours:.1f} replica hours"
    )
    yield f"{len(found.flaps(soon))} times a replica went and one came back within {soon:.0f} s"


def _clock(seconds: float) -> str:
    return f"{int(seconds // 3600):02}:{int(seconds % 3600 // 60):02}:{int(seconds % 60):02}"


if __name__ == "__main__":
    sys.exit(main())
