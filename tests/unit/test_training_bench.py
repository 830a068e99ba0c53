"""What the bench concludes from its measurements: the best round counts, for TRL's best setting too."""

from __future__ import annotations

from typing import Any

import pytest

from benches.tuning import KAITO, OURS, TRL, compare


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
