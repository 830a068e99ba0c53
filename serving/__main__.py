"""Command line of the serving container: engine, compile, sidecar, router, evaluate."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from artifacts.store import StoreError
from blobs import BlobError
from common import cli, exits
from common.settings import SettingsError, load_settings
from serving.client import EngineError
from serving.router import add_arguments, become_router
from serving.spec import ServingSpec

EPILOG = """
one replica is two processes that share a folder (--state):
  python -m serving engine  --spec serving.yaml --state STATE --port 8000      vLLM, becomes the process itself
  python -m serving sidecar --spec serving.yaml --state STATE --engine http://127.0.0.1:8000
in front of the replicas:
  python -m serving router  --port 8080 --replica http://10.0.0.4:8000 --replica http://10.0.0.5:8000
  python -m serving router  --host 0.0.0.0 --port 8080 --selector app=engine --namespace serving     in Kubernetes
so that further replicas need not compile:
  python -m serving compile --spec serving.yaml --into az://ACCOUNT/compiled/KEY
  python -m serving engine  --spec serving.yaml --state STATE --compiled az://ACCOUNT/compiled/KEY
before anything is served:
  python -m serving evaluate --spec serving.yaml --run runs/my-adapter
  python -m serving evaluate --spec serving.yaml --run runs/my-adapter --store oci://HOST/PREFIX     and publish it
environment:
  DRYDOCK_CACHE     the one folder that vLLM may write to, where the root file system is read-only
  DRYDOCK_API_KEYS  as --api-keys of the engine
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    parser = argparse.ArgumentParser(
        "python -m serving", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    engine = commands.add_parser("engine", help="become vLLM with the request layer")
    engine.add_argument("--spec", type=Path, required=True)
    engine.add_argument("--state", type=Path, required=True, help="folder shared with the sidecar")
    engine.add_argument("--host", default="127.0.0.1")
    engine.add_argument("--port", type=int, default=8000)
    engine.add_argument(
        "--api-keys",
        type=Path,
        metavar="FILE",
        help='JSON: {"clients": {NAME: {"sha256": that of its key, in hex}}}, and "tiers" as docs/serving.md has them; '
        "read again when it changes [no key needed]",
    )

    engine.add_argument(
        "--compiled",
        metavar="AZ",
        help="az://... of compiled graphs to start with, if they are there; needs DRYDOCK_CACHE [compile]",
    )

    compiling = commands.add_parser("compile", help="put compiled graphs where engines find them; needs DRYDOCK_CACHE")
    compiling.add_argument("--spec", type=Path, required=True)
    compiling.add_argument("--into", required=True, metavar="AZ", help="az://ACCOUNT/CONTAINER/PATH")
    compiling.add_argument("--port", type=int, default=8000, help="of vLLM, on loopback [%(default)s]")
    compiling.add_argument(
        "--timeout-seconds", type=float, default=1800, help="for vLLM to be ready within [%(default)s]"
    )

    sidecar = commands.add_parser("sidecar", help="follow the promoted tags for one engine")
    sidecar.add_argument("--spec", type=Path, required=True)
    sidecar.add_argument("--state", type=Path, required=True, help="folder shared with the engine")
    sidecar.add_argument("--engine", default="http://127.0.0.1:8000")
    sidecar.add_argument("--cache", type=Path, help="where fetched adapters are kept [STATE/cache]")
    sidecar.add_argument(
        "--faults",
        type=Path,
        metavar="FOLDER",
        help="where a drill may declare, in the file registry_unreachable_until (unix seconds, at most 30 minutes "
        "ahead), that the store is to count as out of reach; the network is left alone [nowhere]",
    )
    sidecar.add_argument(
        "--metrics-address", default="127.0.0.1:9402", help="Prometheus endpoint, or off [%(default)s]"
    )

    router = commands.add_parser("router", help="become vllm-router before the replicas")
    add_arguments(router)

    evaluate = commands.add_parser("evaluate", help="compare tuned adapters with their base; exit 3: gate not passed")
    evaluate.add_argument("--spec", type=Path, required=True)
    evaluate.add_argument("--run", type=Path, action="append", required=True, help="folder of a finished tuning run")
    evaluate.add_argument("--server", help="a running server that has the runs as candidate-NAME [starts its own]")
    evaluate.add_argument("--port", type=int, default=8000, help="of the server that it starts [%(default)s]")
    evaluate.add_argument("--log", type=Path, help="where that server's output goes [a file in the first run]")
    evaluate.add_argument(
        "--store", help="publish each run there once it is evaluated, promoted if it passed [publish nothing]"
    )

    arguments = parser.parse_args(argv)
    if arguments.command == "router":
        become_router(router, arguments)
    command = {"engine": _engine, "compile": _compile, "sidecar": _sidecar, "evaluate": _evaluate}[arguments.command]
    failures = (EngineError, StoreError, BlobError, TimeoutError, httpx.HTTPError)
    return cli.run(command, arguments, log_format="%(asctime)s %(message)s", failures=failures)


def _engine(arguments: argparse.Namespace) -> int:
    from serving.engine import vllm_command, vllm_environment
    from serving.state import prepare

    spec = load_settings(arguments.spec, ServingSpec)
    prepare(arguments.state)
    fetched = {}
    if arguments.compiled:
        from serving.compiled import fetch
        from serving.startup import FETCHED

        signal.signal(signal.SIGTERM, lambda *_: os._exit(exits.TERMINATED))  # PID 1 would not hear it meanwhile
        if found := fetch(spec, arguments.compiled, _cache("--compiled")):
            fetched = {FETCHED: str(found)}
    command = vllm_command(spec, host=arguments.host, port=arguments.port)
    # exec: the container's PID 1 must be vLLM itself, or SIGTERM would not reach it and no request would drain.
    environment = vllm_environment(spec, state=arguments.state, api_keys=arguments.api_keys)
    os.execve(command[0], command, os.environ | environment | fetched)


def _compile(arguments: argparse.Namespace) -> int:
    from serving.compiled import make

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(exits.TERMINATED))  # unwinds, so that vLLM is ended
    spec, cache = load_settings(arguments.spec, ServingSpec), _cache("compile")
    made = make(spec, arguments.into, cache, port=arguments.port, timeout_seconds=arguments.timeout_seconds)
    print(f"{arguments.into}: {'compiled graphs are there' if made else 'compiled graphs were there already'}")
    return exits.OK


def _cache(who: str) -> Path:
    if not os.environ.get("DRYDOCK_CACHE"):
        raise SettingsError([f"{who}: needs DRYDOCK_CACHE, the folder in which vLLM keeps what it compiles"])
    return Path(os.environ["DRYDOCK_CACHE"]).absolute()


def _sidecar(arguments: argparse.Namespace) -> int:
    from prometheus_client import start_http_server

    from artifacts.store import open_store
    from serving.client import Engine
    from serving.faults import drilled
    from serving.sidecar import Sidecar
    from serving.state import prepare, read_token

    spec = load_settings(arguments.spec, ServingSpec)
    address = cli.metrics_address(arguments.metrics_address)
    prepare(arguments.state)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with Engine(arguments.engine, read_token(arguments.state)) as engine:
        cache = arguments.cache or arguments.state / "cache"
        store = open_store(spec.store)
        if arguments.faults:
            store = drilled(store, arguments.faults)
        sidecar = Sidecar(spec, store, engine, arguments.state, cache)
        if address:
            start_http_server(address[1], address[0], registry=sidecar.metrics.registry)
        while not stop.is_set():
            settled = sidecar.look()
            stop.wait(spec.poll_seconds if settled else min(0.5, spec.poll_seconds))
    return exits.OK


def _evaluate(arguments: argparse.Namespace) -> int:
    from serving.client import Engine
    from serving.evaluate import Run, evaluate, open_run

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(exits.TERMINATED))  # unwinds, so that `_server` ends its vLLM
    spec = load_settings(arguments.spec, ServingSpec)
    runs = [open_run(folder) for folder in arguments.run]
    if arguments.store:
        _check_store(arguments.store)

    def judge(url: str, runs: list[Run]) -> int:
        passed = []
        with Engine(url) as engine:
            for run in runs:
                result = evaluate(run, engine, spec.base_name, context=spec.max_model_len)
                passed.append(result["passed"])
                print(f"{run.spec.adapter}: {result['verdict']}")
                if arguments.store:
                    _publish(run.folder, arguments.store)
        return exits.OK if all(passed) else exits.GATE

    if arguments.server:
        return judge(arguments.server, runs)
    with _server(spec, runs, arguments.port, arguments.log or runs[0].folder / "vllm.log") as url:
        return judge(url, runs)


def _check_store(url: str) -> None:
    """A mistyped address is told before the evaluation, not after it."""
    from artifacts.store import open_store

    try:
        open_store(url)
    except ValueError as error:
        raise SettingsError([f"--store: {error}"]) from error


def _publish(run: Path, store: str) -> None:
    from training.publish import publish

    published = publish(run, store)
    state = "promoted" if published.promoted else "a candidate that nobody serves"
    print(f"{published.name} {published.version} {published.digest}: published, {state}")


@contextmanager
def _server(spec: ServingSpec, runs: list, port: int, log: Path) -> Iterator[str]:  # type: ignore[type-arg]
    """A vLLM of its own with the runs' adapters, for as long as the block lasts; yields its URL."""
    from serving.engine import running, vllm_command, vllm_environment

    url = f"http://127.0.0.1:{port}"
    command = vllm_command(
        spec.model_copy(update={"max_lora_rank": max(run.spec.lora_r for run in runs)}),
        host="127.0.0.1",
        port=port,
        adapters={run.name: run.folder / "adapter" for run in runs},
        middleware=False,  # nobody but this process asks
    )
    logging.info("starting vLLM for the evaluation (log: %s)", log)
    with running(command, os.environ | vllm_environment(spec), url, timeout_seconds=1800, output=log):
        yield url


if __name__ == "__main__":
    sys.exit(main())
