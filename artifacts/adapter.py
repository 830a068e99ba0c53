"""What an adapter artifact holds, and the three things done with one: publish, promote, fetch.

An adapter `kubectl` lives in the repository `adapters/kubectl`. Each version is one artifact, tagged with the
first eight hex digits of its manifest digest; the tag `promoted` marks the version that replicas serve. The
config blob is the `AdapterCard`; the layers are PEFT's two files and the reports that prove the adapter.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from artifacts.store import TITLE, Artifact, Store
from common import tensors
from common.lora import ADAPTER_NAME, MAX_LORA_RANK, vllm_lora_rank

CARD_TYPE = "application/vnd.drydock.adapter.v1+json"
PROMOTED = "promoted"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
REPORT_FILES = ("spec.json", "tuning.json", "evaluation.json", "canaries.json", "README.md", "curves.svg")

# vllm/lora/peft_helper.py (0.32): inits that leave the base weights as they are.
VLLM_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_FEATURES = {  # PEFT setting -> how to tune without it
    "use_dora": "tune with use_dora=False",
    "lora_bias": "tune with lora_bias=False",
    "alora_invocation_tokens": "tune a plain LoRA, without alora_invocation_tokens",
    "layer_replication": "tune without layer_replication",
    "use_bdlora": "tune without use_bdlora",
    "use_qalora": "tune with use_qalora=False",
    "modules_to_save": "tune with modules_to_save=None; name such modules in target_modules",
    "trainable_token_indices": "tune without trainable_token_indices",
}
_LORA_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?"
)


class AdapterError(ValueError):
    """The adapter cannot be published, promoted or fetched; `problems` are lines ready to print."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class NotProven(AdapterError):
    """The version has not passed its evaluation, so it may not serve."""


class AdapterCard(BaseModel):
    """The config blob: all that a person or a replica asks about a version without fetching its weights."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)  # a later publisher may say more

    name: str = Field(description="the adapter's name, which is also the alias that clients ask for")
    base_model: str = Field(description="the base model's public name, no path of a machine")
    base_revision: str = Field(description="sha256:<hex> of the base model's folder (common.files.tree_digest)")
    dataset_digest: str = Field(description="sha256:<hex> of the dataset it was tuned on")
    tuning: dict[str, Any] = Field(default={}, description="the TuningSpec")
    evaluation: dict[str, Any] = Field(
        default={}, description="evaluation.json without its samples; empty: not evaluated"
    )
    versions: dict[str, str] = Field(default={}, description="package name to version that tuned and evaluated it")
    lora_rank: int | None = Field(
        default=None, description="largest rank in adapter_config.json; set by publish_adapter"
    )
    vllm_max_lora_rank: int | None = Field(
        default=None, description="smallest --max-lora-rank that serves it; likewise"
    )

    @field_validator("name")
    @classmethod
    def _name_rule(cls, name: str) -> str:
        return check_name(name)

    @field_validator("evaluation")
    @classmethod
    def _figures_only(cls, evaluation: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in evaluation.items() if key != "samples"}

    @property
    def passed(self) -> bool:
        """Whether the evaluation says that this version beats its base. Not evaluated is not passed."""
        return self.evaluation.get("passed") is True


@dataclass(frozen=True)
class FetchedAdapter:
    """An adapter version on this machine; `folder` holds the PEFT files and the reports."""

    name: str
    version: str
    digest: str
    folder: Path
    card: AdapterCard


def check_name(name: str) -> str:
    """`name` itself. Raises `ValueError` unless it can name a repository, a volume and a model alias."""
    if not re.fullmatch(ADAPTER_NAME, name):
        raise ValueError(
            f"adapter name {name!r}: expected 1 to 40 of a-z, 0-9 and '-', first and last a letter or digit"
        )
    return name


def repository(name: str) -> str:
    """The repository of the adapter `name`."""
    return f"adapters/{check_name(name)}"


def version(digest: str) -> str:
    """The version, which is also the tag, of an artifact: the first eight hex digits of its digest."""
    return digest.removeprefix("sha256:")[:8]


def publish_adapter(store: Store, name: str, folder: Path, card: AdapterCard, reports: Path | None = None) -> str:
    """Store the PEFT adapter in `folder` as a version of `name` and return its manifest digest.

    Reports (`REPORT_FILES`) are taken from the folder `reports` where they exist there, else from `folder`.
    Nothing is promoted. Raises `AdapterError` with every reason why vLLM would refuse or misread the adapter.
    """
    target = repository(name)
    problems = check_adapter(folder)
    if card.name != name:
        problems.append(f"the card is for the adapter {card.name!r}, not for {name!r}: build it with name={name!r}")
    if problems:
        raise AdapterError(problems)
    rank = _largest_rank(json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")))
    card = card.model_copy(update={"lora_rank": rank, "vllm_max_lora_rank": vllm_lora_rank(rank)})
    files = {title: folder / title for title in (CONFIG_FILE, WEIGHTS_FILE)}
    for title in REPORT_FILES:
        for place in (reports, folder):
            if place is not None and (place / title).is_file():
                files[title] = place / title
                break
    try:
        digest = store.push(target, files, card.model_dump(mode="json"), CARD_TYPE)
    except ValueError as error:  # json: "Out of range float values are not JSON compliant"
        raise AdapterError([f"the card of {name}: {error}"]) from error
    store.tag(target, digest, version(digest))
    return digest


def promote(store: Store, name: str, reference: str) -> str:
    """Move the tag `promoted` of `name` to a version (its digest or tag) and return the digest.

    Raises `NotProven` when the version's evaluation did not pass or is absent: nothing overrides that.
    """
    digest, card = read_card(store, name, reference)
    require_passed(name, digest, card, "promoted")
    store.tag(repository(name), digest, PROMOTED)
    return digest


def require_passed(name: str, digest: str, card: AdapterCard, done: str) -> None:
    """Raise `NotProven`, which says that the version is not `done`, unless its evaluation passed."""
    if not card.passed:
        verdict = card.evaluation.get("verdict") or (
            "its evaluation failed" if card.evaluation else "it was never evaluated"
        )
        raise NotProven(
            [f"{name} {version(digest)} is not {done}: {verdict}", "only a version that beat its base may serve"]
        )


def promoted_digest(store: Store, name: str) -> str | None:
    """The digest of the promoted version, None before the first: cheap enough to ask every few seconds."""
    return store.find(repository(name), PROMOTED)


def read_card(store: Store, name: str, reference: str) -> tuple[str, AdapterCard]:
    """Digest and card of one version, without its weights."""
    artifact = store.inspect(repository(name), reference)
    return artifact.digest, _card(artifact, name)


def fetch_adapter(store: Store, name: str, reference: str, target: Path) -> FetchedAdapter:
    """Fetch a version into the new folder `target`, every byte verified; it appears whole or not at all."""
    inspected = store.inspect(repository(name), reference)
    card = _card(inspected, name)  # before the weights travel: a wrong artifact leaves no folder behind
    artifact = store.pull(repository(name), inspected.digest, target)
    return FetchedAdapter(name, version(artifact.digest), artifact.digest, target, card)


def adapter_names(store: Store) -> list[str]:
    """The names of all adapters in the store."""
    names = (name.removeprefix("adapters/") for name in store.repositories() if name.startswith("adapters/"))
    return [name for name in names if re.fullmatch(ADAPTER_NAME, name)]  # others may keep something else beside them


def check_adapter(folder: Path) -> list[str]:
    """Every reason why plain vLLM would refuse or misread the adapter in `folder`, each with its remedy.

    Reads the settings and the header of the safetensors file, no weights. Rules: vllm/lora/peft_helper.py and
    vllm/lora/lora_model.py (0.32). An empty list means that nothing was found.
    """
    problems = []
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    config: dict[str, Any] | None = None
    if not config_path.is_file():
        problems.append(f"{config_path}: no such file; write the adapter with PEFT's save_pretrained")
    else:
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(f"{config_path}: not JSON: {error}; write the adapter again")
        else:
            if not isinstance(config, dict):
                problems.append(f"{config_path}: expected PEFT's settings, a JSON object; write the adapter again")
                config = None
    rank = None
    if config is not None:
        found = _config_problems(config)
        problems += [f"{config_path}: {problem}" for problem in found]
        rank = config.get("r") if not found and not config.get("rank_pattern") else None
    if not weights_path.is_file():
        binary = folder / "adapter_model.bin"
        remedy = (
            f"{binary.name} is there: save with safe_serialization=True"
            if binary.exists()
            else "save the adapter again"
        )
        problems.append(f"{weights_path}: no such file; {remedy}")
    else:
        problems += [f"{weights_path}: {problem}" for problem in _weight_problems(weights_path, rank)]
    return problems


def lora_shapes(weights: Path) -> dict[str, tuple[int, int]]:
    """By module, the shape of each base weight that the adapter in `weights` changes; `check_adapter` found it good.

    A linear layer's is `(out, in)`, an embedding's `(rows, width)`.
    """
    sides, embeddings = {}, set()
    for key, shape in tensors.shapes(weights).items():
        if match := _LORA_KEY.fullmatch(key):
            sides[match["module"], match["side"]] = shape
            embeddings |= {match["module"]} if match["embedding"] else set()
    pairs = {module: (sides[module, "B"][0], sides[module, "A"][1]) for module in sorted({each for each, _ in sides})}
    return {module: pair[::-1] if module in embeddings else pair for module, pair in pairs.items()}


def _config_problems(config: dict[str, Any]) -> list[str]:
    problems = []
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        problems.append(f"peft_type is {kind!r}; vLLM serves LORA only: tune with LoraConfig")
    if config.get("lora_alpha") is None or not config.get("target_modules"):
        problems.append("lora_alpha and target_modules are needed; write the adapter with PEFT's save_pretrained")
    ranks = {
        "r": config.get("r"),
        **{f"rank_pattern.{k}": v for k, v in (config.get("rank_pattern") or {}).items()},
    }
    for key, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_LORA_RANK:
            problems.append(f"{key} is {rank!r}; vLLM takes a rank from 1 to {MAX_LORA_RANK}: tune with such a lora_r")
    if (bias := config.get("bias", "none")) != "none":
        problems.append(f"bias is {bias!r}; vLLM serves no adapter bias: tune with bias='none'")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in VLLM_INITS:
        problems.append(
            f"init_lora_weights is {init!r}, which changes the base weights: set init_lora_weights=True "
            "or save with PEFT's path_initial_model_for_weight_conversion"
        )
    problems += [
        f"{key} is {config[key]!r}, which vLLM does not serve: {remedy}"
        for key, remedy in _FEATURES.items()
        if config.get(key)
    ]
    return problems


def _weight_problems(path: Path, rank: int | None) -> list[str]:
    """Problems in the tensors' names and shapes. `rank` None: each pair's own rank is not compared."""
    try:
        shapes = tensors.shapes(path)
    except ValueError as error:
        return [f"{error}; save the adapter again"]
    if not shapes:
        return ["holds no tensors; save the adapter again, with its adapter active"]
    problems, sides, embeddings, strange = [], {}, [], []
    for key, shape in shapes.items():
        match = _LORA_KEY.fullmatch(key)
        if match and bool(match["embedding"]) != bool(match["weight"]):
            sides[match["module"], match["side"]] = shape
        elif re.search(r"\b(embed_tokens|lm_head)\b", key):
            embeddings.append(key)
        else:
            strange.append(key)
    if embeddings:
        problems.append(
            f"holds the base's embeddings ({_some(embeddings)}), which vLLM refuses or leaves out: add no "
            "tokens to the tokenizer and save with save_embedding_layers=False"
        )
    if strange:
        problems.append(
            f"tensors that are no plain LoRA ({_some(strange)}), which vLLM refuses or silently leaves out: "
            "expected base_model.model.<module>.lora_A.weight and .lora_B.weight; save with save_pretrained"
        )
    modules = sorted({module for module, _ in sides})
    unpaired = [module for module in modules if (module, "A") not in sides or (module, "B") not in sides]
    if unpaired:
        problems.append(f"lora_A or lora_B is missing for {_some(unpaired)}; save the adapter again")
    for module in (module for module in modules if module not in unpaired):
        a, b = sides[module, "A"], sides[module, "B"]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or rank not in (None, a[0]):
            want = f"{rank}" if rank else "the rank"
            problems.append(
                f"{module}: lora_A is {a} and lora_B {b}; expected ({want}, in) and (out, {want}): "
                f"{CONFIG_FILE} and weights must come from the same save"
            )
    return problems


def _largest_rank(config: dict[str, Any]) -> int:
    return max([int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values())])


def _some(names: list[str]) -> str:
    """The first three names and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _card(artifact: Artifact, name: str) -> AdapterCard:
    """The card of a fetched artifact, which must be a whole adapter of that name. Raises `AdapterError`."""
    where = f"adapters/{name}@{artifact.digest}"
    if (kind := artifact.manifest["config"]["mediaType"]) != CARD_TYPE:
        raise AdapterError([f"{where}: expected an adapter ({CARD_TYPE}), found {kind}"])
    titles = [(layer.get("annotations") or {}).get(TITLE) for layer in artifact.manifest["layers"]]
    if missing := [title for title in (CONFIG_FILE, WEIGHTS_FILE) if title not in titles]:
        told = f"lacks {' and '.join(missing)}; publish it with artifacts.adapter.publish_adapter"
        raise AdapterError([f"{where}: {told}"])
    try:
        card = AdapterCard.model_validate_json(artifact.config)
    except ValidationError as error:
        raise AdapterError([f"{where}: its card cannot be read: {error}"]) from error
    if card.name != name:
        raise AdapterError([f"{where}: its card is for the adapter {card.name!r}"])
    return card
