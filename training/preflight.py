"""What would stop a run, told before a GPU or a weight is touched: base, layers and disk, all of it together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from common.settings import SettingsError
from training.base import EMBEDDINGS, base_config, base_shapes, folder_problems, load_tokenizer
from training.checkpoint import KEEP
from training.spec import TuningSpec

FLOAT_BYTES = 4
KEPT_FLOATS = 3
"""A checkpoint holds each adapter weight in fp32, and AdamW's two moments of it."""


def problems(spec: TuningSpec, out: Path) -> list[str]:
    """Every reason why `spec` cannot be tuned into `out`, as far as base and machine show it; none: go on."""
    if found := folder_problems(spec.base_model):
        return found
    folder = Path(spec.base_model)
    try:
        load_tokenizer(folder)
    except SettingsError as error:
        found += error.problems
    layers = linear_layers(folder)
    known = {name.rpartition(".")[2] for name in layers}
    if unknown := sorted(set(spec.lora_target_modules) - known):
        found.append(f"lora_target_modules: {', '.join(unknown)} not in this base; it has {', '.join(sorted(known))}")
        return found
    return found + rope_problems(base_config(folder), spec.max_seq_length) + _disk_problems(spec, layers, out)


def rope_problems(config: dict[str, Any], max_seq_length: int) -> list[str]:
    """Positions that a row's neighbours in a pass would change, of a base with such a `config`.

    transformers 5 (modeling_rope_utils.py, dynamic_rope_update) chooses the frequencies of `longrope` and `dynamic` by
    the longest row of a pass; vLLM by what it may serve at most.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type")
    places = (config.get("original_max_position_embeddings"), rope.get("original_max_position_embeddings"))
    original = next((place for place in places if place), config.get("max_position_embeddings"))
    if kind not in ("longrope", "su", "dynamic") or not original or max_seq_length <= original:
        return []
    return [
        f"max_seq_length: {max_seq_length} is beyond the {original} tokens that this base was made for, and how it "
        f"goes beyond them (rope_type {kind}) depends on the longest row of a pass; {original} at most can be tuned on"
    ]


def linear_layers(folder: Path) -> dict[str, tuple[int, ...]]:
    """Each linear layer of the base, with `(out, in)`: what an adapter may be added to."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in base_shapes(folder).items()
        if len(shape) == 2 and not name.endswith(EMBEDDINGS)
    }


def adapter_weights(spec: TuningSpec, layers: dict[str, tuple[int, ...]]) -> int:
    """How many numbers the adapter of `spec` has: for each layer A of rank x in, B of out x rank."""
    targets = tuple(f".{target}" for target in spec.lora_target_modules)
    return spec.lora_r * sum(sum(shape) for name, shape in layers.items() if name.endswith(targets))


def _disk_problems(spec: TuningSpec, layers: dict[str, tuple[int, ...]], out: Path) -> list[str]:
    """Too little room beside `out`: for the checkpoints that are kept, the next one being written, and the adapter."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    needed = adapter_weights(spec, layers) * FLOAT_BYTES * ((KEEP + 1) * KEPT_FLOATS + 1)
    left = shutil.disk_usage(place).free + sum(
        path.stat().st_size for path in (out / "checkpoints").rglob("*") if path.is_file()
    )
    if left >= needed:
        return []
    return [
        f"--out: {out}: {needed / 2**30:.2f} GiB are needed for {KEEP} checkpoints, the next one and the adapter of "
        f"lora_r = {spec.lora_r}, {left / 2**30:.2f} GiB are free; name a larger disk, or lower lora_r"
    ]
