"""Our trainer against TRL's SFTTrainer: the same model, rows, adapter and machine; useful tokens a second of each.

    python -m benches.tuning --out out          needs TRL beside the trainer: benches/requirements.lock

    useful tokens    tokens of the rows themselves, without padding
    tokens a second  useful tokens of one epoch / seconds of the training loop, loading and tokenising left out
    MFU              4 x parameters of the linear layers x tokens a second / dense bf16 FLOP/s of the GPU; on a GPU
                     only. 4, not the 6 of Chowdhery et al. 2022 (PaLM): the frozen base gets no gradient of its weights
    held-out loss    of the finished adapter in plain transformers and peft, one row at a time, nats an answer token

TRL runs at KAITO's defaults (one row a pass, no packing, gradient checkpointing: its lora-params-template and TRL's
own defaults) and at faster settings, of which the best counts. Every setting starts from the same weights and takes
some 16 rows an optimiser step, so that all learn the same; a step after each row, as in KAITO, would cost it more time.
Each runs in a process of its own, one after the other, and again for each round; the best round of each counts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common.files import write_json
from training.spec import GateSpec, TuningSpec

DATASET = Path(__file__).parent.parent / "rehearsal" / "data" / "kubectl.jsonl"
OURS = "drydock"
KAITO = "trl, kaito's defaults"
TRL: dict[str, dict[str, Any]] = {
    KAITO: {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "gradient_checkpointing": True},
    "trl, 1 row": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16},
    "trl, 4 rows padded": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "trl, 4 rows padding-free": {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "padding_free": True, "max_length": None,
    },
    "trl, packed": {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "packing": True, "max_length": 1024,
    },
}  # fmt: skip
CPU_MODEL = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2,
}  # fmt: skip
PEAK_FLOPS = {"A100": 312e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "A10": 125e12}
"""Dense bf16 of the GPUs that Azure has, from NVIDIA's datasheets; by a part of the name that the driver gives."""
GPU_MODEL = {  # the shape of Llama 3.2 1B: what a GPU is not bored by
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8,
}  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure all settings and write OUT/bench-tuning.json; or, in the process of one setting, measure that."""
    parser = argparse.ArgumentParser(
        "python -m benches.tuning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of bench-tuning.json [%(default)s]")
    parser.add_argument("--rows", type=int, default=400, help="rows to tune on, about [%(default)s]")
    parser.add_argument("--rounds", type=int, default=2, help="times that each setting runs [%(default)s]")
    parser.add_argument("--only", metavar="SETTING", choices=[OURS, *TRL], help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    folder = arguments.out / "bench-tuning"
    if arguments.only:
        print(json.dumps(_measure(arguments.only, folder)))
        return 0
    shutil.rmtree(folder, ignore_errors=True)
    facts = prepare(folder, arguments.rows)
    print(f"{facts['rows']} rows of {facts['tokens_per_row']:.0f} tokens, {facts['model']}, {facts['device']}")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in (OURS, *TRL)}
    for _ in range(arguments.rounds):
        for name, done in runs.items():
            done.append(_apart(name, arguments.out))
            print(f"{name:<28}{done[-1]['tokens_per_second']:>9,.0f} tokens/s", flush=True)
    result = facts | compare(runs)
    ours = result["settings"][OURS]
    ours |= on_gpu(facts, ours["tokens_per_second"], folder)
    write_json(arguments.out / "bench-tuning.json", result)
    print(f"\n{'':<28}{'tokens/s':>9}{'held-out loss':>16}{'ours is':>10}")
    for name, of in result["settings"].items():
        ratio = result["settings"][OURS]["tokens_per_second"] / of["tokens_per_second"]
        print(f"{name:<28}{of['tokens_per_second']:>9,.0f}{of['held_out_loss']:>16.4f}{ratio:>9.2f}x")
    for key, text in (
        ("mfu", "MFU {:.1%}"),
        ("peak_gib", "peak memory {:.2f} GiB"),
        ("fit_gib", "infra.fit said {:.2f}"),
    ):
        if ours.get(key) is not None:
            print(f"{OURS}: {text.format(ours[key])}")
    print(
        f"\n{result['ratio_kaito_defaults']:.2f} times TRL at KAITO's defaults, {result['ratio_trl_best']:.2f} times "
        f"its best ({result['trl_best']}): {arguments.out / 'bench-tuning.json'}"
    )
    return 0


def compare(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Speeds, losses and ratios of `runs`, the measurements of each setting; the best round of each counts."""
    settings = {
        name: {
            "tokens_per_second": max(each["tokens_per_second"] for each in done),
            "rounds": [each["tokens_per_second"] for each in done],
            "held_out_loss": statistics.mean(each["held_out_loss"] for each in done),
            "peak_gib": None if done[0]["peak_gpu_bytes"] is None else done[0]["peak_gpu_bytes"] / 2**30,
        }
        for name, done in runs.items()
    }
    speed = {name: of["tokens_per_second"] for name, of in settings.items()}
    best = max((name for name in speed if name != OURS), key=speed.__getitem__)
    return {
        "settings": settings,
        "trl_best": best,
        "ratio_kaito_defaults": speed[OURS] / speed[KAITO],
        "ratio_trl_best": speed[OURS] / speed[best],
    }


def mfu(tokens_per_second: float, linear_parameters: int, device: str) -> float | None:
    """Model FLOPs utilisation, a share of 1; None on a device whose peak is not known here."""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    return None if peak is None else 4 * linear_parameters * tokens_per_second / peak


def on_gpu(facts: dict[str, Any], tokens_per_second: float, folder: Path) -> dict[str, Any]:
    """MFU, and the memory that the fit check foretells for this run in GiB; nothing on a CPU."""
    if facts["precision"] != "bfloat16":
        return {}
    from infra.catalog import SKUS, architecture_of
    from infra.fit import tuning_fit, tuning_load

    model = architecture_of(folder / "base" / "config.json")
    spec = TuningSpec.model_validate_json((folder / "spec.json").read_text())
    linear = model.num_hidden_layers * sum(inputs * outputs for inputs, outputs in model.linear_layers.values())
    size = next(size for size in SKUS.values() if size.gpu.bf16)  # the need is the same on each of these
    return {
        "mfu": mfu(tokens_per_second, linear, facts["device"]),
        "fit_gib": tuning_fit(model, size, tuning_load(spec, model, [size.name])).total_gib,
    }


def prepare(folder: Path, rows: int) -> dict[str, Any]:
    """Write base, dataset and settings into `folder`; what they are, for the report."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    gpu = torch.cuda.is_available()
    tokenizer = _tokenizer()
    set_seed(0)
    config = LlamaConfig(
        **(GPU_MODEL if gpu else CPU_MODEL), vocab_size=len(tokenizer), max_position_embeddings=2048,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    data = folder / "rows.jsonl"
    lines = DATASET.read_text(encoding="utf-8").splitlines()
    data.write_text("".join(f"{line}\n" for line in lines[: math.ceil(rows / 0.9)]), encoding="utf-8")
    spec = settings(folder)
    write_json(folder / "spec.json", spec.model_dump(mode="json"))
    examples, _ = _examples(spec)
    return {
        "device": torch.cuda.get_device_name() if gpu else f"{os.cpu_count()} CPU cores",
        "precision": "bfloat16" if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32",
        "model": f"Llama of {config.num_hidden_layers} layers of {config.hidden_size}, random weights",
        "rows": len(examples),
        "tokens_per_row": statistics.mean(len(example.ids) for example in examples),
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "trl")},
    }


def settings(folder: Path) -> TuningSpec:
    """What both trainers are told."""
    # No warm-up: ours starts it above 0 and transformers at 0, which counts in so few steps.
    return TuningSpec(
        adapter="bench", base_model=str(folder / "base"), dataset=str(folder / "rows.jsonl"), num_train_epochs=1,
        lora_r=8, lora_alpha=8, lora_dropout=0.0, learning_rate=2e-3, warmup_ratio=0.0, save_minutes=1e6,
        held_out_fraction=0.1,
        gate=GateSpec(min_examples=1),  # nothing is judged here
    )  # fmt: skip


def _tokenizer() -> Any:
    """One token a byte: rows as long as real ones, from the short rows of the rehearsal."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rehearsal.pretrain import CHAT_TEMPLATE, SPECIAL

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={text: n for n, text in enumerate([*SPECIAL, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[1], extra_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def _examples(spec: TuningSpec) -> tuple[list[Any], list[Any]]:
    """Rows to tune on and held-out rows, encoded: the very tokens that both trainers get."""
    from training.base import load_tokenizer
    from training.begin import split
    from training.encode import encode_all

    tuning, held_out, _ = split(spec)
    tokenizer = load_tokenizer(Path(spec.base_model))
    return tuple(encode_all(rows, tokenizer, spec.max_seq_length)[0] for rows in (tuning, held_out))  # type: ignore[return-value]


def _apart(name: str, out: Path) -> dict[str, Any]:
    """`_measure` in a process of its own, so that no setting inherits the memory or the threads of another."""
    command = [sys.executable, "-m", "benches.tuning", "--out", str(out), "--only", name]
    # The same for all: see _tune in training/__main__.py.
    environment = {"GOMP_SPINCOUNT": "3000", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | os.environ
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _measure(name: str, folder: Path) -> dict[str, Any]:
    import torch

    spec = TuningSpec.model_validate_json((folder / "spec.json").read_text())
    run = folder / "runs" / name.replace(" ", "-")
    shutil.rmtree(run, ignore_errors=True)
    tokens, seconds = _tune_ours(spec, run) if name == OURS else _tune_by_trl(spec, run, TRL[name])
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {
        "tokens_per_second": tokens / seconds,
        "held_out_loss": _held_out_loss(spec, run / "adapter"),
        "peak_gpu_bytes": peak,
    }


def _tune_ours(spec: TuningSpec, run: Path) -> tuple[int, float]:
    from training.tune import tune

    summary = tune(spec, run)
    return summary["tokens"], summary["seconds"]


def _tune_by_trl(spec: TuningSpec, run: Path, setting: dict[str, Any]) -> tuple[int, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):  # type: ignore[misc]
        seconds = 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.monotonic()

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds = time.monotonic() - self.started

    examples, _ = _examples(spec)
    labels = [[-100] * each.prompt_length + list(each.ids[each.prompt_length :]) for each in examples]
    rows = Dataset.from_dict({"input_ids": [list(each.ids) for each in examples], "labels": labels})
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if half else torch.float32
    torch.manual_seed(spec.seed)
    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(spec.base_model, dtype=dtype),
        args=SFTConfig(
            **{"gradient_checkpointing": False, "max_length": spec.max_seq_length} | setting,
            output_dir=str(run / "trl"), num_train_epochs=spec.num_train_epochs, learning_rate=spec.learning_rate,
            warmup_steps=spec.warmup_ratio, max_grad_norm=spec.max_grad_norm, weight_decay=spec.weight_decay,
            lr_scheduler_type=spec.lr_scheduler_type, logging_steps=spec.logging_steps, seed=spec.seed, bf16=half,
            save_strategy="no", report_to="none", disable_tqdm=True,
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(spec.base_model),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=spec.lora_r, lora_alpha=spec.lora_alpha, lora_dropout=spec.lora_dropout,
            target_modules=list(spec.lora_target_modules),
        ),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(run / "adapter")
    return sum(len(each.ids) for each in examples), clock.seconds


def _held_out_loss(spec: TuningSpec, adapter: Path) -> float:
    import torch
    from peft import PeftModel
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base = AutoModelForCausalLM.from_pretrained(spec.base_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval().to(device)
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for example in _examples(spec)[1]:
            ids, start = torch.tensor([example.ids], device=device), example.prompt_length
            logits = model(input_ids=ids).logits[0, start - 1 : -1]
            loss += cross_entropy(logits, ids[0, start:], reduction="sum").item()
            tokens += example.answer_length
    return loss / tokens


if __name__ == "__main__":
    sys.exit(main())
