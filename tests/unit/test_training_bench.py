"""What the bench concludes from its measurements: the best round counts, for TRL's best setting too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benches.tuning import GPU_MODEL, KAITO, OURS, TRL, compare, mfu, on_gpu, settings
from common.files import write_json


def measured(speed: float, loss: float = 1.0) -> dict[str, Any]:
    return {"tokens_per_second": speed, "held_out_loss": loss, "peak_gpu_bytes": None}


def test_the_ratios_are_to_kaitos_defaults_and_to_the_fastest_of_trl() -> None:
    runs = {name: [measured(500.0), measured(400.0)] for name in TRL}
    runs[KAITO] = [measured(100.0), measured(200.0)]
    runs["trl, packed"] = [measured(700.0), measured(800.0)]
    runs[OURS] = [measured(1000.0, 1.0), measured(900.0, 2.0)]
    result = compare(runs)
    assert result["ratio_kaito_defaults"] == pytest.approx(5)
    assert (result["trl_best"], result["ratio_trl_best"]) == ("trl, packed", pytest.approx(1.25))
    assert result["settings"][OURS]["rounds"] == [1000, 900]
    assert result["settings"][OURS]["held_out_loss"] == pytest.approx(1.5)


def test_mfu_counts_four_operations_a_parameter_and_token() -> None:
    # 4 x 7e9 x 1e4 / 312e12
    assert mfu(10_000, 7_000_000_000, "NVIDIA A100 80GB PCIe") == pytest.approx(0.897, abs=1e-3)
    assert mfu(1000, 7_000_000_000, "NVIDIA H100 NVL") == pytest.approx(4 * 7e12 / 835e12)
    assert mfu(1000, 7_000_000_000, "2 CPU cores") is None


def test_only_a_gpu_has_them(tmp_path: Path) -> None:
    assert on_gpu({"precision": "float32", "device": "2 CPU cores"}, 1000, tmp_path) == {}
    config = GPU_MODEL | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000}
    write_json(tmp_path / "base" / "config.json", config | {"max_position_embeddings": 2048})
    write_json(tmp_path / "spec.json", settings(tmp_path).model_dump(mode="json"))
    found = on_gpu({"precision": "bfloat16", "device": "NVIDIA H200"}, 20_000, tmp_path)
    assert 0.05 < found["mfu"] < 0.1  # 0.97e9 parameters: 4 x 0.97e9 x 2e4 / 989e12
    assert found["fit_gib"] > 2.3  # the weights in bf16 alone
