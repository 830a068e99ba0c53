"""The load on a real replica: what it calls shed, answered and late is what the replica counted, in both arrivals."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.files import read_json, read_jsonl
from tests.contract.conftest import Replica
from tests.unit.test_stress_fake import stress

ARRIVALS: dict[str, dict[str, Any]] = {
    "closed": {"users": 10, "duration_seconds": 4},
    "poisson": {"arrivals": "poisson", "requests_per_second": 25, "duration_seconds": 4},
}


def counted(replica: Replica) -> Counter[tuple[str, str]]:
    """drydock_requests_total by tier and outcome."""
    found: Counter[tuple[str, str]] = Counter()
    for line in httpx.get(f"{replica.url}/metrics", timeout=10).text.splitlines():
        if line.startswith("drydock_requests_total{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            found[labels["tier"], labels["outcome"]] += int(float(line.rpartition(" ")[2]))
    return found


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_a_low_tier_is_shed_and_both_sides_count_the_same(
    replica: Replica, work: Path, tmp_path: Path, arrivals: str
) -> None:
    """Two requests of `low` at once are allowed; `any` has no limit."""
    settings = tmp_path / "load.json"
    load = {
        "models": ["base"], "clients": {"any": 1, "low": 1}, "tiers": {"any": "tier-any", "low": "tier-low"},
        "ramp_seconds": 0, "prompt_tokens": 60, "max_tokens": 16, "failure_pause_seconds": 0.1,
        "slo": {"error_rate": 0, "shed_rate": 1, "goodput": {"e2e_ms": 60_000, "min_rps": 0.5}},
    }  # fmt: skip
    settings.write_text(json.dumps(load | ARRIVALS[arrivals]))
    before = counted(replica)
    done = stress(
        "run", "--target", replica.url, "--dataset", work / "rows.jsonl", "--out", tmp_path, "--settings", settings,
        env=os.environ | {"DRYDOCK_API_KEYS": json.dumps({"any": "any", "low": "low"})},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "stress" / "load"
    summary, rows = read_json(folder / "summary.json"), list(read_jsonl(folder / "requests.jsonl"))

    seen = counted(replica) - before
    for client, preflights in (("any", 2), ("low", 2)):
        part, tier = summary["by_client"][client], f"tier-{client}"
        answered = part["requests"] - part["failed"] - part["shed"]
        assert seen[tier, "ok"] == answered + preflights
        assert seen[tier, "concurrency_limit_exceeded"] == part["shed"]
        assert summary["by_tier"][tier] == part
    assert summary["by_client"]["any"]["shed"] == 0 < summary["by_client"]["low"]["shed"] == summary["shed"]
    assert summary["failed"] == 0 and summary["retry_after_seconds"]["p50"] == 1
    assert summary["retry_after_obeyed"] is (arrivals == "closed")
    assert {row["status"] for row in rows} == {200, 429}
    if arrivals == "poisson":
        assert 60 < summary["requests"] < 145  # 100 by chance
        assert summary["ttft_ms"]["p50"] >= summary["ttft_from_sending_ms"]["p50"]
