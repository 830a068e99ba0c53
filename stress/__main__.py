"""Command line of the stress container: run a load, run a drill, write the report."""

from __future__ import annotations

import sys

if sys.argv[1:2] in (["run"], ["worker"]):
    # before anything imports sockets or threads; the drills and the report do without gevent
    from gevent import monkey

    monkey.patch_all()

import argparse
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from common import exits
from common.cli import host_port
from common.settings import SettingsError, explain, load_settings
from stress import cluster
from stress.client import api_keys, check_target
from stress.scenarios import DrillSpec
from stress.spec import LoadSpec

if TYPE_CHECKING:
    from stress.workers import Workers

EPILOG = f"""
examples   python -m stress run --target http://127.0.0.1:8000 --dataset data.jsonl --out out --models kubectl triage
           ... --arrivals poisson --requests-per-second 5 --clients team=3 batch=1    # keys in DRYDOCK_API_KEYS
           ... --workers 4                                       # by four processes of this machine, or of others:
           ... --workers 4 --listen 0.0.0.0:5557, and on each:  python -m stress worker --master HOST:5557 --target URL
           python -m stress drill replica-loss --dataset data.jsonl --out out --models kubectl --timeout-seconds 300
           python -m stress report out
           in a pod with the rights for it: python -m stress drills --settings drills.json --target http://drydock ...

A settings file holds the fields that `python -m stress settings` lists; options given here override it.
exit codes {exits.OK} measured    {exits.FAILED} not measured (the reason is printed)
           {exits.INPUT} arguments or settings to mend    {exits.GATE} measured, but a bound of `slo` was not kept
           {exits.INTERRUPTED} SIGINT    {exits.TERMINATED} SIGTERM
"""

SCALARS: dict[str, type] = {
    "arrivals": str,
    "requests_per_second": float,
    "max_in_flight": int,
    "users": int,
    "ramp_seconds": float,
    "duration_seconds": float,
    "max_requests": int,
    "prompt_tokens": int,
    "chars_per_token": float,
    "long_share": float,
    "long_multiplier": int,
    "max_tokens": int,
    "ignore_eos": bool,
    "stream_share": float,
    "think_seconds": float,
    "failure_pause_seconds": float,
    "request_timeout_seconds": float,
    "seed": int,
    "workers": int,
}
JOIN_SECONDS = 60.0  # for a worker to come


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", type=Path, required=True, help="JSONL whose rows become the prompts, or a folder of such files"
    )
    parser.add_argument("--out", type=Path, required=True, help="output folder of the whole chain")
    parser.add_argument("--settings", type=Path, help="YAML or JSON with the load's settings")
    parser.add_argument(
        "--allow-remote", action="store_true", help="load a server that is not this machine; be sure that it is yours"
    )
    load = parser.add_argument_group("load")
    load.add_argument("--models", nargs="+", metavar="ALIAS[=WEIGHT]", help=LoadSpec.model_fields["models"].description)
    load.add_argument(
        "--clients", nargs="+", metavar="NAME[=WEIGHT]", help=LoadSpec.model_fields["clients"].description
    )
    for name, kind in SCALARS.items():
        field = LoadSpec.model_fields[name]
        option = f"--{name.replace('_', '-')}"
        if kind is bool:
            load.add_argument(option, action="store_const", const=True, help=field.description)
            continue
        shown = "" if field.default is None else f" [{field.default}]"
        load.add_argument(option, type=kind, metavar=kind.__name__.upper(), help=f"{field.description}{shown}")


def _weights(items: Sequence[str]) -> dict[str, Any] | list[str]:
    """`["a=3", "b"]` as weights."""
    weights: dict[str, Any] = {}
    for item in items:
        name, _, weight = item.partition("=")
        if name in weights:
            return list(items)  # LoadSpec tells about a name given twice
        weights[name] = weight or 1.0
    return weights


def load_spec(arguments: argparse.Namespace) -> LoadSpec:
    """The spec from the settings file and the options. Raises `SettingsError` with every problem."""
    given = {name: getattr(arguments, name) for name in SCALARS if getattr(arguments, name) is not None}
    if arguments.models:
        given["models"] = _weights(arguments.models)
    if arguments.clients:
        given["clients"] = _weights(arguments.clients)
    if arguments.settings:
        return load_settings(arguments.settings, LoadSpec, **given)
    try:
        return LoadSpec.model_validate(given)
    except ValidationError as error:
        raise SettingsError(explain(error, LoadSpec)) from None


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["report"]:
        from stress import report

        return int(report.main(argv[1:]) or 0)
    parser = argparse.ArgumentParser(
        "python -m stress", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="load an endpoint; writes OUT/stress/SCENARIO/{requests.jsonl,summary.json}")
    run.add_argument("--target", required=True, help="URL of the OpenAI-compatible server or router")
    run.add_argument("--scenario", default="load", help="name of this run's folder [%(default)s]")
    run.add_argument(
        "--wait-seconds",
        type=float,
        default=0.0,
        metavar="N",
        help="wait so long for a model that does not answer yet, and for a role just granted to count [0]",
    )
    run.add_argument(
        "--push", metavar="DST", help="write the report afterwards and put OUT there: az://ACCOUNT/CONTAINER/PATH"
    )
    run.add_argument(
        "--listen",
        metavar="HOST:PORT",
        help="with --workers: do not start them here, but wait for them at this address; whoever reaches it can be one",
    )
    run.add_argument(
        "--join-seconds",
        type=float,
        default=JOIN_SECONDS,
        metavar="N",
        help="with --workers: wait so long for all of them [%(default)g]",
    )
    run.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # the drills put their phases elsewhere
    run.add_argument("--follow-parent", action="store_true", help=argparse.SUPPRESS)
    run.add_argument("--open-ended", action="store_true", help=argparse.SUPPRESS)
    _common(run)
    worker = commands.add_parser(
        "worker", help="make a part of the load of a `run --workers N --listen` elsewhere; keys as there"
    )
    worker.add_argument("--master", required=True, metavar="HOST:PORT", help="where that run listens")
    worker.add_argument("--target", required=True, help="as for run")
    worker.add_argument("--allow-remote", action="store_true", help="as for run")
    worker.add_argument(
        "--wait-seconds", type=float, default=JOIN_SECONDS, metavar="N", help="wait so long for it [%(default)g]"
    )
    worker.add_argument("--follow-parent", action="store_true", help=argparse.SUPPRESS)
    drill = commands.add_parser("drill", help="break something and measure; writes OUT/drills/DRILL.json")
    drill.add_argument("drill", choices=["long-prompts", "replica-loss", "outage"])
    drill.add_argument("--fleet", type=Path, help="fleet file of the supervisor [OUT/fleet.json]")
    drill.add_argument("--target", help="long-prompts: load this URL instead of the fleet's router")
    drill.add_argument("--replica", help="replica-loss: which one to kill [the first]")
    drill.add_argument(
        "--before-seconds", type=float, default=10.0, help="replica-loss: load before the kill [%(default)s]"
    )
    drill.add_argument(
        "--after-seconds", type=float, default=5.0, help="replica-loss: load after the return [%(default)s]"
    )
    drill.add_argument(
        "--timeout-seconds", type=float, default=600.0, help="give up waiting for recovery [%(default)s]"
    )
    _common(drill)
    several = commands.add_parser(
        "drills", help="break what serves in the cluster of this pod, one drill after the other, each judged"
    )
    several.add_argument(
        "--settings",
        type=Path,
        required=True,
        help="JSON with load, scenarios and bounds; registry-unreachable is told to the sidecars, the network is left "
        "alone",
    )
    several.add_argument("--target", required=True, help="URL of the router")
    several.add_argument(
        "--dataset", type=Path, required=True, help="JSONL, or a folder of such files, for the prompts"
    )
    several.add_argument("--out", type=Path, required=True, help="output folder")
    several.add_argument("--namespace", required=True, help="of the replicas")
    several.add_argument("--tuning-namespace", required=True, help="of the tuning Jobs")
    several.add_argument("--wait-seconds", type=float, default=0.0, metavar="N", help="as for run [0]")
    several.add_argument("--push", metavar="DST", help="as for run: az://ACCOUNT/CONTAINER/PATH")
    several.add_argument("--api-server", default=cluster.SERVER, help=argparse.SUPPRESS)  # another one in tests
    several.add_argument("--account", type=Path, default=cluster.ACCOUNT, help=argparse.SUPPRESS)
    commands.add_parser("settings", help="every setting of the load with its default and meaning")
    commands.add_parser("report", help="write OUT/report.json and OUT/report.html")

    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "settings":
            _settings(LoadSpec)
            return exits.OK
        if arguments.command == "run":
            return _run(arguments)
        if arguments.command == "worker":
            return _worker(arguments)
        return _drills(arguments) if arguments.command == "drills" else _drill(arguments)
    except SettingsError as error:
        print("\n".join(f"stress: {problem}" for problem in error.problems), file=sys.stderr)
        return exits.INPUT
    except OSError as error:  # what the network does is in the figures: this is the output folder, or a full disk
        print(f"stress: {error}", file=sys.stderr)
        return exits.FAILED
    except KeyboardInterrupt:
        return exits.INTERRUPTED


def _settings(model: type[BaseModel], prefix: str = "") -> None:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            _settings(field.annotation, f"{prefix}{name}.")
            continue
        default = "required" if field.is_required() else json.dumps(field.default)
        print(f"{prefix}{name}: {default}\n    {field.description}")


def _run(arguments: argparse.Namespace) -> int:
    from stress.prompts import read_rows

    spec = load_spec(arguments)
    check_target(arguments.target, arguments.allow_remote)
    if arguments.listen and spec.workers == 1:
        raise SettingsError(["listen: one process makes this load by itself: raise workers, or leave it out"])
    keys = api_keys(spec.clients or ())
    rows = read_rows(arguments.dataset)
    folder = arguments.folder or arguments.out / "stress" / arguments.scenario
    place = None
    with contextlib.ExitStack() as held:
        # Before anything that may wait: they are told when it comes to nothing.
        workers = held.enter_context(_workers(arguments, spec)) if spec.workers > 1 else None
        if arguments.push:
            from stress import delivery

            place = delivery.opened(arguments.push, arguments.wait_seconds)
        from stress.load import run

        code = run(
            arguments.target,
            spec,
            rows,
            folder,
            keys=keys,
            wait_seconds=arguments.wait_seconds,
            follow_parent=arguments.follow_parent,
            open_ended=arguments.open_ended,
            workers=workers,
        )
    if place is None or not (folder / "summary.json").exists():
        return code
    delivered = delivery.deliver(arguments.out, place)
    return code or delivered  # a breach is the news, whatever became of its report


def _workers(arguments: argparse.Namespace, spec: LoadSpec) -> Workers:
    from stress.workers import Workers

    command = [sys.executable, "-m", "stress", "worker", "--target", arguments.target]
    return Workers(
        spec,
        command=command + ["--allow-remote"] * arguments.allow_remote,
        listen=host_port(arguments.listen, "--listen") if arguments.listen else None,
        join_seconds=arguments.join_seconds,
    )


def _worker(arguments: argparse.Namespace) -> int:
    check_target(arguments.target, arguments.allow_remote)
    from stress.workers import work

    return work(
        host_port(arguments.master, "--master"),
        arguments.target,
        wait_seconds=arguments.wait_seconds,
        follow_parent=arguments.follow_parent,
    )


def _drill(arguments: argparse.Namespace) -> int:
    from stress import drills
    from stress.prompts import read_rows

    spec = load_spec(arguments)
    for name in ("before_seconds", "after_seconds", "timeout_seconds"):
        if getattr(arguments, name) <= 0:
            raise SettingsError([f"{name}: must be above 0, found {getattr(arguments, name):g}"])
    read_rows(arguments.dataset)
    plan = drills.Plan(
        out=arguments.out,
        dataset=arguments.dataset,
        fleet=arguments.fleet or arguments.out / "fleet.json",
        spec=spec,
        allow_remote=arguments.allow_remote,
        target=arguments.target,
        replica=arguments.replica,
        before_seconds=arguments.before_seconds,
        after_seconds=arguments.after_seconds,
        timeout_seconds=arguments.timeout_seconds,
    )
    return drills.main(arguments.drill, plan)


def _drills(arguments: argparse.Namespace) -> int:
    from stress import drills
    from stress.prompts import read_rows

    wanted = load_settings(arguments.settings, DrillSpec)
    check_target(arguments.target, True)
    read_rows(arguments.dataset)
    place = None
    if arguments.push:
        from stress import delivery

        place = delivery.opened(arguments.push, arguments.wait_seconds)
    api = cluster.Api(arguments.api_server, arguments.account)
    plan = drills.Plan(
        out=arguments.out,
        dataset=arguments.dataset,
        fleet=arguments.out / "fleet.json",
        spec=wanted.load,
        allow_remote=True,
        before_seconds=wanted.before_seconds,
        after_seconds=wanted.after_seconds,
        cluster=cluster.Cluster(api, arguments.target, arguments.namespace, arguments.tuning_namespace),
        bounds=wanted.bounds,
    )
    code = drills.in_turn(plan, wanted, arguments.wait_seconds)
    if place is None or not (arguments.out / "drills").is_dir() or code in (exits.INTERRUPTED, exits.TERMINATED):
        return code
    delivered = delivery.deliver(arguments.out, place)
    return code or delivered  # what was found is the news, whatever became of its report


if __name__ == "__main__":
    sys.exit(main())
