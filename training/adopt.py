"""Takes in an adapter that was tuned elsewhere, by PEFT, TRL or KAITO, so that it is held to the same proof as ours."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from artifacts.adapter import CONFIG_FILE, WEIGHTS_FILE, AdapterError, check_adapter, lora_shapes
from artifacts.image import Pulled, pull
from artifacts.store import NotFound
from common.files import file_digest, read_json, write_json, write_jsonl
from common.settings import SettingsError, explain
from training.base import base_folder, base_revision, base_shapes
from training.source import public
from training.spec import TuningSpec

log = logging.getLogger(__name__)

KNOWN = ("adapter", "base_model", "dataset", "held_out_fraction", "max_seq_length", "gate")
"""The settings that are ours to know: what is asked of the adapter. How it was tuned is not, beyond what PEFT wrote."""


def adopt(spec: TuningSpec, adapter: str, out: Path) -> dict[str, Any]:
    """Make `out` the folder of a run whose adapter is `adapter` (a folder, or oci://...); returns its `tuning.json`.

    It holds what `serving evaluate` and `training publish` need, and nothing that was not seen: no steps, no loss, no
    learning rate. `spec` gives name, base, dataset (its held-out rows are what the gate asks) and gate. Raises
    `SettingsError` with every reason why the adapter cannot be served on that base, or `out` holds something else;
    `StoreError` where an image's registry fails.
    """
    if not adapter.startswith("oci://"):
        return _adopt(spec, Path(adapter), out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".image-") as temporary:
        folder = Path(temporary) / "data"
        try:
            image = pull(adapter, folder)
        except (AdapterError, NotFound, ValueError) as error:
            raise SettingsError([f"--adapter: {line}" for line in str(error).splitlines()]) from error
        try:
            return _adopt(spec, folder, out, image)
        except SettingsError as error:  # told of the image: the folder is gone by then
            raise SettingsError([problem.replace(str(folder), image.reference) for problem in error.problems]) from None


def _adopt(spec: TuningSpec, adapter: Path, out: Path, image: Pulled | None = None) -> dict[str, Any]:
    from training.begin import split  # here: it loads torch, and the problems of a spec are told before

    base = base_folder(spec.base_model)
    if problems := check_adapter(adapter):
        raise SettingsError(problems)
    config = read_json(adapter / CONFIG_FILE)
    shapes = lora_shapes(adapter / WEIGHTS_FILE)
    theirs = _from_peft(config, shapes)
    problems = _base_problems(adapter, shapes, spec.base_model) + _spec_problems(spec, theirs)
    try:
        settings = spec.model_dump(mode="json", include=set(KNOWN)) | theirs
        settings["dataset"] = public(spec.dataset)
        TuningSpec.model_validate(settings)
    except ValidationError as error:
        problems += [f"{adapter / CONFIG_FILE}: {problem}" for problem in explain(error, TuningSpec)]
    if problems:
        raise SettingsError(problems)
    # KAITO's pods have the base in /workspace/weights, whichever it is; their image says which preset it was.
    tuned_on = (image and image.model) or config.get("base_model_name_or_path")
    if tuned_on and Path(tuned_on).name.lower() != base.name.lower():
        where = "image" if image and image.model else CONFIG_FILE
        log.warning("its %s says that it was tuned on %s; it will be measured on %s", where, tuned_on, base)
    _, held_out, checked = split(spec)
    digests = {name: file_digest(adapter / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
    origin = {
        "fingerprint": hashlib.sha256(json.dumps(["adopted", digests]).encode()).hexdigest(),
        "dataset_digest": checked.digest,
        "base_revision": base_revision(base),
    }
    written_by = config.get("peft_version")
    summary = {
        "adapter": spec.adapter,
        **origin,
        "held_out": len(held_out),
        "adopted": {"files": digests, "base_model": tuned_on, **({"image": image.reference} if image else {})},
        "versions": {"peft": str(written_by)} if written_by else {},
    }
    _make_way(out, summary)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (out / "adapter").mkdir(parents=True, exist_ok=True)
        shutil.copyfile(adapter / name, out / "adapter" / name)
    write_json(out / "spec.json", settings)
    write_jsonl(out / "held_out.jsonl", (row for _, row in held_out))
    write_json(out / "tuning.json", summary)
    return summary


def _base_problems(adapter: Path, shapes: dict[str, tuple[int, int]], base: str) -> list[str]:
    """Why the adapter's matrices do not fit `base`: layers that it lacks, and other sizes."""
    there = base_shapes(Path(base))
    absent = [module for module in shapes if f"{module}.weight" not in there]
    other = [
        f"{module} is for {shape}, and there is {there[f'{module}.weight']}"
        for module, shape in shapes.items()
        if module not in absent and there[f"{module}.weight"] != shape
    ]
    found = [f"layers that {base} lacks: {_some(absent)}"] if absent else []
    found += [f"sizes that are not those of {base}: {_some(other)}"] if other else []
    return [f"{adapter / WEIGHTS_FILE}: {problem}; name the base that it was tuned on" for problem in found]


def _spec_problems(spec: TuningSpec, theirs: dict[str, Any]) -> list[str]:
    """Settings that a person wrote down and that the adapter contradicts: it may be another adapter that is meant."""
    return [
        f"{name}: the settings say {getattr(spec, name)}, the adapter's {CONFIG_FILE} {theirs[name]}; leave it out, or "
        "name the adapter that is meant"
        for name in ("lora_r", "lora_alpha")
        if name in spec.model_fields_set and getattr(spec, name) != theirs[name]
    ]


def _from_peft(config: dict[str, Any], shapes: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """What the adapter's own files say, by our names. The rank is the largest, which is what a server must hold."""
    return {
        "lora_r": max([config["r"], *(config.get("rank_pattern") or {}).values()]),
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config.get("lora_dropout", 0.0),
        "lora_target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
    }


def _make_way(out: Path, summary: dict[str, Any]) -> None:
    """Clear the verdict of an earlier adoption from `out`. Raises `SettingsError` when it holds another run."""
    if not out.exists() or not any(out.iterdir()):
        return
    before = read_json(out / "tuning.json") if (out / "tuning.json").is_file() else {}
    if before.get("fingerprint") != summary["fingerprint"]:
        raise SettingsError([f"--out: {out}: holds something else, which would be lost; name a new folder"])
    if before | {"adopted": None} != summary | {"adopted": None}:
        # Other rows or another base: what was measured does not hold any more.
        for name in ("evaluation.json", "canaries.json"):
            (out / name).unlink(missing_ok=True)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
