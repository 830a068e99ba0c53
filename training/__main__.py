"""Command line of the training container: check a dataset, tune or adopt an adapter, publish it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

from artifacts.store import StoreError
from blobs import BlobError
from common import cli, exits, logs
from common.settings import SettingsError, load_settings
from training import launch
from training.spec import TuningSpec

EXIT_CODES = f"""
exit codes
  {exits.OK}    done
  {exits.FAILED}    something broke that another try may heal; a Job in the cluster tries again
  {exits.INPUT}    dataset, settings, base or arguments to mend: each problem is told, with line and remedy; no retry
  {exits.GATE}    the gate was not passed: published as a candidate, not promoted; no retry
  {exits.INTERRUPTED}  Ctrl-C: run again to resume from the newest checkpoint
  {exits.TERMINATED}  SIGTERM, after a checkpoint of the last whole step was written: run again to resume
"""

EPILOG = f"""
from data to an adapter that may be served
  python -m training check data.jsonl --base path/to/llama              every problem of the rows, with its line
  python -m training tune --spec my.yaml --out runs/my                  run it again and it resumes
  python -m serving evaluate --spec serving.yaml --run runs/my          adapter against base, through vLLM
  python -m training publish --run runs/my --store oci://HOST/PREFIX    promoted if it passed
an adapter that PEFT or TRL made elsewhere
  python -m training adopt --spec my.yaml --adapter FOLDER --out runs/my    then evaluate and publish, as above
  python -m training adopt --spec my.yaml --adapter oci://HOST/REPO:TAG --out runs/my     an image of KAITO's tuning

a dataset row    {{"instruction": "...", "input": "...", "output": "..."}}
                 or {{"messages": [{{"role": "user", "content": "..."}}, {{"role": "assistant", "content": "..."}}]}}
a settings file  adapter: my-adapter
                 base_model: path/to/llama
                 dataset: data.jsonl
                 learning_rate: 2e-4
                 lora_r: 16                      all settings: python -m training settings
{EXIT_CODES}
each command has a --help of its own"""

CHECK = f"""
example
  python -m training check data.jsonl --spec my.yaml

Nothing is written. Problems go to standard output as FILE:LINE: found ...; expected ..., or, with --json, to standard
error, and the summary to standard output.
{EXIT_CODES}"""

TUNE = f"""
example
  python -m training tune --spec my.yaml --out runs/my
  tensorboard --logdir runs                     (from `pip install tensorboard`, wherever the files can be read)

files in --out
  adapter/                                      the adapter in PEFT's format: PeftModel.from_pretrained(base, ...)
  tuning.json                                   the summary, written last: what has one is finished
  events.jsonl, tensorboard/                    loss, learning rate, tokens/s, ... over the steps
  held_out.jsonl                                the rows that tuning never sees and the evaluation asks
  spec.json, run.json                           the settings; digests of data and base
  checkpoints/                                  the newest two: adapter, optimiser, schedule, random state

what is refused before a weight is loaded: settings that vLLM could not serve, rows with problems, a base that is
incomplete, quantised, without a chat template, of another architecture or with another tokenizer, too little disk

while it runs
  a terminal shows a bar; anything else gets a line each 10 s, as JSON with the figures as numbers
  {logs.CHOICE}=json|text        in the environment chooses that form wherever it goes
  --metrics-address          Prometheus: drydock_tuning_loss, _step, _tokens_per_second, _eta_seconds, ...

several GPUs, several machines (on each the same command, with its own --node-rank)
  --processes auto
  --processes auto --nodes 2 --rendezvous FIRST-MACHINE:29500 --rejoin --node-rank 0
{EXIT_CODES}"""

ADOPT = f"""
example
  python -m training adopt --spec my.yaml --adapter path/from/trl --out runs/my
  python -m training adopt --spec my.yaml --adapter oci://HOST/REPO[:TAG|@sha256:...] --out runs/my
  python -m serving evaluate --spec serving.yaml --run runs/my
  python -m training publish --run runs/my --store oci://HOST/PREFIX

The settings file needs adapter, base_model and dataset, and may have a gate: what the adapter is asked. Learning rate
and the like are not taken over from it: how the adapter was tuned is not known, and its card says so. What vLLM cannot
serve is refused: DoRA, biases, modules_to_save, changed embeddings, a rank beyond 512, matrices of another base.

oci://... is an image with the adapter in /data, as KAITO's tuning pushes it. Only adapter_config.json and
adapter_model.safetensors are taken out of it; the image's digest is recorded. Signed in to as an adapter store is.
Whoever tuned it may have used another chat template, or none: the evaluation asks through the one of the base here.

files in --out: adapter/ (a copy), spec.json, tuning.json, held_out.jsonl
{EXIT_CODES}"""

PUBLISH = f"""
example
  python -m training publish --run runs/my --store oci://HOST/PREFIX      or a folder, such as out/registry

The artifact adapters/NAME holds the adapter, the settings, the evaluation, the canaries and the model card README.md
with its curves.svg, which are written into the run's folder too. Its tag is its version, the first eight hex digits of
its digest; the tag `promoted`, which replicas follow, moves only if the gate was passed.
{EXIT_CODES}"""


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m training", description=__doc__, epilog=EPILOG, formatter_class=shape)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, epilog: str | None = None) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, epilog=epilog, formatter_class=shape)

    check = command("check", "list every problem of a dataset, with its line; write nothing", CHECK)
    check.add_argument("file", help="local path, https://... or az://ACCOUNT/CONTAINER/PATH")
    check.add_argument(
        "--spec", type=Path, help="settings file: its base, max_seq_length, held_out_fraction and gate set the limits"
    )
    check.add_argument("--base", help="folder of the base model: counts prompts in its tokens")
    check.add_argument("--max-seq-length", type=int, help="default: the spec's, otherwise 1024")
    check.add_argument("--json", action="store_true", help="print the summary as one JSON object")

    tune = command("tune", "tune a LoRA adapter; run again to resume", TUNE)
    tune.add_argument("--spec", type=Path, required=True, help="settings file (YAML)")
    tune.add_argument("--out", type=Path, required=True, help="folder of this run")
    tune.add_argument("--metrics-address", default="127.0.0.1:9401", help="Prometheus endpoint, or off [%(default)s]")
    tune.add_argument(
        "--fresh", action="store_true", help="discard what an earlier run left in --out and --checkpoints"
    )
    tune.add_argument(
        "--checkpoints", metavar="az://ACCOUNT/CONTAINER/RUN", help="copy checkpoints there; resume from it"
    )
    launch.add_arguments(tune)

    adopt = command("adopt", "take in an adapter that PEFT, TRL or KAITO made, to evaluate and publish it", ADOPT)
    adopt.add_argument("--spec", type=Path, required=True, help="settings file: adapter, base_model, dataset, gate")
    adopt.add_argument(
        "--adapter", required=True, help="folder with adapter_config.json and its weights, or oci://HOST/REPO[:TAG]"
    )
    adopt.add_argument("--out", type=Path, required=True, help="folder of the run that this makes")

    publish = command("publish", "push an evaluated adapter; move `promoted` if its gate passed", PUBLISH)
    publish.add_argument("--run", type=Path, required=True, help="folder of a run with its evaluation.json")
    publish.add_argument("--store", required=True, help="oci://registry/prefix, or a folder")

    command("settings", "every setting with its default and meaning")

    arguments = parser.parse_args(argv, argparse.Namespace(argv=sys.argv[1:] if argv is None else argv))
    chosen = {"check": _check, "tune": _tune, "adopt": _adopt, "publish": _publish, "settings": _settings}
    return cli.run(
        chosen[arguments.command],
        arguments,
        failures=(StoreError, BlobError, OSError),  # a full disk among them
        machines_read=arguments.command == "tune",
    )


def _check(arguments: argparse.Namespace) -> int:
    from training.dataset import Checked, Limits, Problem, is_held_out, read, split_problem
    from training.source import local, public

    spec = load_settings(arguments.spec, TuningSpec) if arguments.spec else None
    path = local(arguments.file, spec.dataset_sha256 if spec and spec.dataset == arguments.file else None)
    name = public(arguments.file)
    base = arguments.base or (spec.base_model if spec else None)
    default = spec.max_seq_length if spec else TuningSpec.model_fields["max_seq_length"].default
    limits = Limits(arguments.max_seq_length or default)
    if base:
        try:
            from training.base import base_limits

            limits = base_limits(base, limits.max_seq_length)
        except ModuleNotFoundError as error:  # on a deployer's machine, which has what `pulumi up` needs
            said = f"{base}: its tokens are counted by {error.name}, which `make setup` installs into .venv"
            raise SettingsError([f"{said}: use .venv/bin/python, or leave the base out"]) from None
    started, checked, held_out = time.monotonic(), Checked(), 0
    told = sys.stderr if arguments.json else sys.stdout
    try:
        for item in read(path, limits, checked):
            if isinstance(item, Problem):
                print(f"{name}:{item}", file=told)
            elif spec:
                held_out += is_held_out(item[1], spec.held_out_fraction)
    except OSError as error:
        raise SettingsError([f"{name}: {error.strerror}"]) from None
    seconds = time.monotonic() - started
    if arguments.json:
        summary = {"examples": checked.rows, "rejected": checked.rejected, "digest": checked.digest, "seconds": seconds}
        print(json.dumps(summary))
    else:
        bad = f"{checked.rejected:,} with problems" if checked.rejected else "no problems"
        print(f"{name}: {checked.rows:,} good rows, {bad} ({seconds:.1f} s)")
    problem = None
    if spec and not checked.rejected:
        least = spec.gate.min_examples
        problem = split_problem(checked.rows - held_out, held_out, spec.held_out_fraction, least)
    if problem:
        print(f"{name}: {problem}", file=told)
    return exits.INPUT if checked.rejected or problem else exits.OK


def _tune(arguments: argparse.Namespace) -> int:
    spec = load_settings(arguments.spec, TuningSpec)
    address = cli.metrics_address(arguments.metrics_address)
    # OpenMP threads spin while they wait, and stand still when another process needs a core too. Steps per second on
    # two cores, free / one of them busy: 5.5 / 0.7 by default, 5.3 / 2.3 with few spins, 2.7 / 3.7 with none.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    if (code := launch.launched(arguments)) is not None:
        return code
    if not launch.is_first():
        logging.getLogger().setLevel(logging.WARNING)  # the first process speaks for all
    from transformers.utils import logging as theirs

    from training.tune import Terminated, tune  # after the settings: a typing error is told before torch loads

    as_json = logs.wants_json()
    if as_json:  # its own handler writes lines of text
        theirs.disable_default_handler()
        theirs.enable_propagation()
    try:
        summary = tune(
            spec,
            arguments.out,
            metrics_address=address,
            fresh=arguments.fresh,
            checkpoints=arguments.checkpoints,
            rejoin=arguments.rejoin,
        )
    except Terminated as error:
        cli.tell(str(error), as_json=as_json)
        return exits.TERMINATED
    if not launch.is_first():
        return exits.OK
    said = (
        f"{arguments.out / 'adapter'}: {summary['steps']} steps, {summary['tokens']:,} tokens in "
        f"{summary['seconds']:.0f} s ({summary['tokens_per_second']:,.0f} tokens/s), loss {summary['final_loss']:.3f}"
    )
    print(logs.line("info", said, summary) if as_json else said)
    return exits.OK


def _adopt(arguments: argparse.Namespace) -> int:
    spec = load_settings(arguments.spec, TuningSpec)
    from training.adopt import adopt

    summary = adopt(spec, arguments.adapter, arguments.out)
    print(
        f"{arguments.out}: {spec.adapter}, {summary['held_out']:,} rows to be asked; next: python -m serving evaluate"
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
