"""Command line of the training container: check a dataset, tune an adapter, publish it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from artifacts.store import StoreError
from blobs import BlobError
from common import cli, exits
from common.settings import SettingsError, load_settings
from training.spec import TuningSpec

EPILOG = f"""
a dataset row  {{"instruction": "...", "input": "...", "output": "..."}} or {{"messages": [{{"role", "content"}}, ...]}}
a settings file adapter: my-adapter
                base_model: path/to/llama
                dataset: data.jsonl
                learning_rate: 2e-4
                lora_r: 16                      all settings: python -m training settings

exit codes      {exits.OK} done    {exits.INPUT} dataset, settings or arguments to mend    {exits.GATE} gate not passed
                {exits.TERMINATED} SIGTERM, checkpoint written: run again to resume    {exits.FAILED} anything else
"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    parser = argparse.ArgumentParser(
        "python -m training", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="list every problem of a dataset, with its line; write nothing")
    check.add_argument("file", type=Path)
    check.add_argument("--spec", type=Path, help="settings file: its base and max_seq_length set the limits")
    check.add_argument("--base", help="folder of the base model: counts prompts in its tokens")
    check.add_argument("--max-seq-length", type=int, help="default: the spec's, otherwise 1024")
    check.add_argument("--json", action="store_true", help="print the summary as one JSON object")

    tune = commands.add_parser("tune", help="tune a LoRA adapter; run again to resume")
    tune.add_argument("--spec", type=Path, required=True, help="settings file (YAML)")
    tune.add_argument("--out", type=Path, required=True, help="folder of this run")
    tune.add_argument("--metrics-address", default="127.0.0.1:9401", help="Prometheus endpoint, or off [%(default)s]")
    tune.add_argument(
        "--fresh", action="store_true", help="discard what an earlier run left in --out and --checkpoints"
    )
    tune.add_argument(
        "--checkpoints", metavar="az://ACCOUNT/CONTAINER/RUN", help="copy checkpoints there; resume from it"
    )

    publish = commands.add_parser("publish", help="push an evaluated adapter; move `promoted` if its gate passed")
    publish.add_argument("--run", type=Path, required=True, help="folder of a tuning run with its evaluation.json")
    publish.add_argument("--store", required=True, help="oci://registry/prefix, or a folder")

    commands.add_parser("settings", help="every setting with its default and meaning")

    arguments = parser.parse_args(argv)
    command = {"check": _check, "tune": _tune, "publish": _publish, "settings": _settings}[arguments.command]
    return cli.run(command, arguments, failures=(StoreError, BlobError))


def _check(arguments: argparse.Namespace) -> int:
    from training.base import base_limits
    from training.dataset import Checked, Problem, read

    spec = load_settings(arguments.spec, TuningSpec) if arguments.spec else None
    base = arguments.base or (spec.base_model if spec else None)
    default = spec.max_seq_length if spec else TuningSpec.model_fields["max_seq_length"].default
    limits = base_limits(base, arguments.max_seq_length or default)
    started, checked = time.monotonic(), Checked()
    try:
        for item in read(arguments.file, limits, checked):
            if isinstance(item, Problem):
                print(f"{arguments.file}:{item}", file=sys.stderr if arguments.json else sys.stdout)
    except OSError as error:
        raise SettingsError([f"{arguments.file}: {error.strerror}"]) from None
    seconds = time.monotonic() - started
    if arguments.json:
        summary = {"examples": checked.rows, "rejected": checked.rejected, "digest": checked.digest, "seconds": seconds}
        print(json.dumps(summary))
    else:
        bad = f"{checked.rejected:,} with problems" if checked.rejected else "no problems"
        print(f"{arguments.file}: {checked.rows:,} good rows, {bad} ({seconds:.1f} s)")
    return exits.INPUT if checked.rejected else exits.OK


def _tune(arguments: argparse.Namespace) -> int:
    spec = load_settings(arguments.spec, TuningSpec)
    # OpenMP threads spin while they wait, and stand still when another process needs a core too. Steps per second on
    # two cores, free / one of them busy: 5.5 / 0.7 by default, 5.3 / 2.3 with few spins, 2.7 / 3.7 with none.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    from training.tune import Terminated, tune  # after the settings: a typing error is told before torch loads

    address = None if arguments.metrics_address == "off" else arguments.metrics_address
    try:
        summary = tune(
            spec, arguments.out, metrics_address=address, fresh=arguments.fresh, checkpoints=arguments.checkpoints
        )
    except Terminated as error:
        print(error, file=sys.stderr)
        return exits.TERMINATED
    print(
        f"{arguments.out / 'adapter'}: {summary['steps']} steps, {summary['tokens']:,} tokens in "
        f"{summary['seconds']:.0f} s ({summary['tokens_per_second']:,.0f} tokens/s), loss {summary['final_loss']:.3f}"
    )
    return exits.OK


def _publish(arguments: argparse.Namespace) -> int:
    from training.publish import publish

    published = publish(arguments.run, arguments.store)
    print(f"{published.name} {published.version} {published.digest}: {published.verdict}")
    return exits.OK if published.promoted else exits.GATE


def _settings(arguments: argparse.Namespace) -> int:
    from training.spec import GateSpec

    for prefix, model in (("", TuningSpec), ("gate.", GateSpec)):
        for name, field in model.model_fields.items():
            if name != "gate":
                default = "required" if field.is_required() else json.dumps(field.default)
                print(f"{prefix + name:32} {field.description}  [{default}]")
    return exits.OK


if __name__ == "__main__":
    sys.exit(main())
