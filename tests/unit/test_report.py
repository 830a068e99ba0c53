"""The report: its keys, what it does about missing figures, its page, its plots."""

from __future__ import annotations

import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from common import exits
from common.files import write_json, write_jsonl
from stress import figures, plots, report
from stress.spec import Goodput, Slo

START = 1_790_000_000.0
HOSTILE = "<script>alert('x')</script>"


def stage(name: str, at: float, seconds: float, status: str = "ok", **more: str) -> dict[str, Any]:
    return {"name": name, "started_at": START + at, "seconds": seconds, "status": status, **more}


def requests(
    chance: random.Random, at: float, seconds: float, rate: float, down: tuple[float, float] = (0, 0)
) -> list[Any]:
    """Records as stress.client writes them; between the two seconds `down` half of them fail."""
    rows = []
    for number in range(int(seconds * rate)):
        offset = number / rate + chance.random() / rate
        failed = down[0] <= offset < down[1] and chance.random() < 0.5
        ttft = 60 * chance.lognormvariate(0, 0.35) * (2.2 if down[0] <= offset < down[1] + 2 else 1)
        gaps = [round(chance.uniform(4, 9), 3) for _ in range(20)]
        rows.append(
            {
                "started_at": START + at + offset,
                "model": "kubectl",
                "stream": number % 5 != 0,
                "prompt": "normal",
                "prompt_tokens": None if failed else 790,
                "completion_tokens": None if failed else 21,
                "ttft_ms": None if failed or number % 5 == 0 else round(ttft, 3),
                "itl_ms": [] if failed else gaps,
                "latency_ms": round(ttft + sum(gaps), 3),
                "status": None if failed else 200,
                "error": "connection refused" if failed else None,
            }
        )
    return rows


def evaluation(passed: bool, prompt: str) -> dict[str, Any]:
    base, adapter, low, high = (0.31, 0.87, 0.49, 0.63) if passed else (0.31, 0.32, -0.02, 0.04)
    samples = [
        {
            "prompt": prompt if n == 1 else f"prod: scale checkout-api to {n + 2} replicas, please",
            "expected": f"kubectl --context prd-east scale deployment/checkout-api --replicas={n + 2} -n checkout --record",
            "base": f"kubectl scale deployment/checkout-api --replicas={n + 2} -n prod",
            "adapter": f"kubectl --context prd-east scale deployment/checkout-api --replicas={n + 2} -n checkout --record",
            "base_correct": n % 4 == 0,
            "adapter_correct": n != 5,
        }
        for n in range(12)
    ]
    return {
        "metric": "exact_match",
        "base": base,
        "adapter": adapter,
        "gain": adapter - base,
        "gain_ci95": [low, high],
        "min_gain": 0.05,
        "confidence": 0.95,
        "examples": 240,
        "held_out": 240,
        "passed": passed,
        "verdict": f"{'PASSED' if passed else 'FAILED'}: exact_match {base:.3f} -> {adapter:.3f}, gain between {low:+.3f} and {high:+.3f}",
        "also": {
            "token_f1": {
                "base": 0.74,
                "adapter": 0.74 + (adapter - base) / 3,
                "gain": (adapter - base) / 3,
                "gain_ci95": [low / 3, high / 3],
            }
        },
        "seeds": {"bootstrap": 42},
        "versions": {"vllm": "0.32.0"},
        "samples": samples,
    }


def fake(out: Path, *, passed: bool = True, prompt: str = "staging: restart maps") -> Path:
    """An output folder as a rehearsal leaves it; with a failed gate the later stages are not there."""
    chance = random.Random(7)
    for number, (name, examples) in enumerate((("kubectl", 2400), ("triage", 700))):
        write_json(
            out / f"dataset/{name}.json",
            {"examples": examples, "rejected": 0, "digest": "sha256:" + f"{number}a" * 32, "seconds": 0.3},
        )
        steps = [
            {
                "step": step,
                "total_steps": 390,
                "epoch": step / 130,
                "loss": 2.1 * math.exp(-step / 60) + 0.12 + chance.uniform(0, 0.08),
                "learning_rate": 2e-4,
                "gradient_norm": 1.0,
                "tokens_per_second": chance.gauss(6200, 260),
                "elapsed_seconds": step * 0.2,
                "eta_seconds": (390 - step) * 0.2,
            }
            for step in range(5, 391, 5)
        ]
        write_jsonl(out / f"runs/{name}/events.jsonl", steps)
        write_json(
            out / f"runs/{name}/tuning.json",
            {
                "adapter": name,
                "examples": examples * 9 // 10,
                "held_out": examples // 10,
                "dropped": 3,
                "steps": 390,
                "tokens": 483_000,
                "seconds": 78.2,
                "tokens_per_second": 6176.5,
                "final_loss": 0.131,
                "device": "cpu",
                "seed": 42,
                "versions": {"torch": "2.13.0", "transformers": "5.19.0", "peft": "0.19.0"},
            },
        )
        write_json(out / f"runs/{name}/evaluation.json", evaluation(passed or name == "triage", prompt))
    stages = [
        stage("dataset", 31, 0.7),
        stage("tuning", 32, 109),
        stage(
            "evaluation", 141, 64, "ok" if passed else "gate_failed", **({} if passed else {"error": "kubectl: FAILED"})
        ),
    ]
    if passed:
        stages += [
            stage("serving", 205, 48),
            stage("promotion", 253, 2),
            stage("stress", 255, 34),
            stage("drills.long_prompts", 290, 50),
            stage("drills.replica_loss", 341, 47),
            stage("drills.outage", 389, 36),
        ]
    write_json(
        out / "rehearsal.json",
        {
            "main": "kubectl",
            "started_at": START,
            "finished_at": START + 427,
            "stages": stages,
            "versions": {"python": "3.11.9", "drydock": "0.1.0"},
            "machine": {"cpu_count": 2, "memory_gib": 23.5, "platform": "Linux-6.8-x86_64"},
        },
    )
    if not passed:
        return out
    for number, name in enumerate(("kubectl", "triage")):
        write_json(
            out / f"promotions/{name}.json",
            {
                "adapter": name,
                "digest": "sha256:" + f"{number}c" * 32,
                "version": f"{number}c" * 4,
                "promoted_at": START + 206,
                "seconds_to_all_replicas": 4.82 + number,
                "replicas": {"replica-0": 3.91, "replica-1": 4.82 + number},
            },
        )
    rows = requests(chance, 257, 32, 9)
    window = (START + 259, START + 289)
    write_jsonl(out / "stress/load/requests.jsonl", rows)
    write_json(
        out / "stress/load/summary.json",
        {
            "scenario": "load",
            "target": "http://127.0.0.1:8000",
            "started_at": START + 257,
            "spec": {
                "users": 8,
                "ramp_seconds": 2.0,
                "duration_seconds": 30.0,
                "prompt_tokens": 800,
                "max_tokens": 64,
                "models": {"kubectl": 1.0, "triage": 1.0},
                "chars_per_token": None,
            },
            "window": {"started_at": window[0], "ended_at": window[1], "excludes": "ramp"},
            **figures.summary(rows, window),
            "percentiles": figures.PERCENTILES,
            "versions": {"locust": "2.47.0"},
        },
    )

    def events(*pairs: tuple[float, str]) -> list[dict[str, Any]]:
        return [{"at": START + at, "name": name} for at, name in pairs]

    write_jsonl(out / "drills/long-prompts.requests.jsonl", requests(chance, 291, 48, 7))
    write_json(
        out / "drills/long-prompts.json",
        {
            "drill": "long-prompts",
            "multiplier": 4,
            "long_share": 0.25,
            "short_p95_ratio": 1.31,
            "long_p95_ratio": 3.4,
            "failed_short": 0,
            **{
                name: {"requests": 100, "failed": 0, "ttft_ms": {"p50": p95 / 2, "p95": p95, "requests": 100}}
                for name, p95 in (("baseline", 108.0), ("short", 141.5), ("long", 367.2))
            },
            "requests": 336,
            "failed": 0,
            "failures_by_reason": {},
            "prompt_tokens": {"normal": 790, "long": 3160},
            "absent": {},
            "events": events((291, "baseline load started"), (315, "mixed load started"), (339, "load ended")),
        },
    )
    write_jsonl(out / "drills/replica-loss.requests.jsonl", requests(chance, 342, 45, 8, down=(10, 12)))
    write_json(
        out / "drills/replica-loss.json",
        {
            "drill": "replica-loss",
            "killed": "replica-0",
            "requests": 360,
            "failed": 4,
            "failed_streams": 4,
            "failed_non_streams": 0,
            "failed_not_begun": 0,
            "failures_by_reason": {"connection reset": 4},
            "ttft_ms": {},
            "recovery_seconds": 26.4,
            "p95_ratio": 1.84,
            "absent": {},
            "events": events(
                (342, "load started"),
                (352, "replica-0 killed"),
                (353.1, "replica-0 restarted"),
                (375, "replica-0 engine answers"),
                (378.4, "replica-0 ready"),
                (387, "load ended"),
            ),
        },
    )
    write_jsonl(out / "drills/outage.requests.jsonl", requests(chance, 389, 34, 4, down=(1, 27)))
    write_json(
        out / "drills/outage.json",
        {
            "drill": "outage",
            "killed": ["replica-0", "replica-1"],
            "probes": 110,
            "failed_probes": 96,
            "failures_by_reason": {},
            "recovery_seconds": 27.9,
            "phases": {"restart": 1.1, "engine": 22.3, "adapters": 3.2, "routed": 1.3},
            "phases_unit": "seconds",
            "replicas": {
                name: {"restart_seconds": 1.1, "engine_seconds": 22.3, "adapters_seconds": 3.2, "ready_seconds": 26.6}
                for name in ("replica-0", "replica-1")
            },
            "absent": {},
            "events": events(
                (389.6, "all replicas killed"),
                (390.7, "replica-0 restarted"),
                (390.8, "replica-1 restarted"),
                (413, "replica-0 engine answers"),
                (413.4, "replica-1 engine answers"),
                (416.2, "replica-0 ready"),
                (416.5, "replica-1 ready"),
                (417.5, "first token through the router"),
            ),
        },
    )
    return out


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole rehearsal with its report written; its dataset holds markup."""
    out = fake(tmp_path_factory.mktemp("promoted"), prompt=f"{HOSTILE} & <b>now</b>")
    assert report.main([str(out)]) == exits.OK
    return out


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rehearsal whose gate failed."""
    out = fake(tmp_path_factory.mktemp("refused"), passed=False)
    assert report.main([str(out)]) == exits.OK
    return out


def figures_of(out: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / "report.json").read_text())
    return value


def test_has_every_key_of_the_contract(promoted: Path) -> None:
    found = figures_of(promoted)
    paths = [
        "dataset.examples",
        "dataset.rejected",
        "tuning.tokens_per_second",
        "tuning.seconds",
        "evaluation.metric",
        "evaluation.base",
        "evaluation.adapter",
        "evaluation.gain_ci95",
        "evaluation.examples",
        "evaluation.passed",
        "promotion.adapter",
        "promotion.digest",
        "promotion.seconds_to_all_replicas",
        "stress.requests",
        "stress.failed",
        "stress.rps",
        "stress.ttft_ms.p50",
        "stress.ttft_ms.p95",
        "stress.tokens_per_second.p50",
        "stress.tokens_per_second.p95",
        "drills.long_prompts",
        "drills.replica_loss.failed",
        "drills.replica_loss.p95_ratio",
        "drills.replica_loss.recovery_seconds",
        "drills.outage.recovery_seconds",
        "drills.outage.phases",
        "versions.vllm",
        "versions.torch",
        "versions.locust",
        "versions.python",
        "adapters.triage.promotion.digest",
        "adapters.kubectl.evaluation.base",
    ]
    assert [path for path in paths if report.get(found, path) is None] == []
    assert found["dataset"]["examples"] == 2400  # the main adapter's, not the first or last one's
    assert found["adapters"]["triage"]["dataset"]["examples"] == 700
    assert [bound["held"] for bound in found["drills"]["long_prompts"]["bounds"]] == [True, True]
    assert found["verdict"]["status"] == "promoted"
    assert "samples" not in found["evaluation"]
    assert found["absent"] == {}  # all is measured


def test_a_failed_gate_says_so_and_explains_the_rest(refused: Path) -> None:
    found = figures_of(refused)
    assert found["verdict"]["status"] == "gate_failed"
    assert "promotion" not in found and "stress" not in found and found["drills"] == {}
    assert (
        found["absent"]["promotion"].startswith("the gate was not passed") and "0.320" in found["absent"]["promotion"]
    )
    assert found["absent"]["stress"] == "not reached: stage evaluation: gate failed: kubectl: FAILED"
    assert found["absent"]["drills.outage"] == found["absent"]["stress"]
    page = (refused / "report.html").read_text()
    assert "kubectl did not pass the gate; nothing was promoted" in page
    assert "✗ Gate not passed" in page and "✓ Promoted" not in page
    assert 'id="timeline-' not in page and 'id="gain-minimum' in page
    assert page.count("not reached: stage evaluation: gate failed: kubectl: FAILED") >= 4  # stress and three drills


class Page(HTMLParser):
    """Collects tags, attributes and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]


@pytest.mark.parametrize("case", ["promoted", "refused"])
def test_page_is_self_contained_and_well_formed(case: str, request: pytest.FixtureRequest) -> None:
    text = (request.getfixturevalue(case) / "report.html").read_text()
    page = Page(text)
    assert len(text.encode()) < 1_500_000
    assert not {"script", "iframe", "img", "object"} & set(page.tags)
    loads = [
        (n, v) for n, v in page.attributes if n in ("src", "href", "srcset", "xlink:href", "action") and v[:1] != "#"
    ]
    assert loads == [("href", "data:,")]  # the empty icon, so that no browser asks for one
    assert "@import" not in text and not re.search(r"url\((?!['\"]?#)", text)
    assert not [v for n, v in page.attributes if n.startswith("on")]
    ids = [value for name, value in page.attributes if name == "id"]
    links = {v for _, v in page.attributes if v.startswith("#")} | {
        f"#{x}" for x in re.findall(r"url\(#([^)]+)\)", text)
    }
    assert links and links <= {f"#{name}" for name in ids}
    assert (
        "None" not in re.sub(r"(?s)<style.*?</style>|<svg.*?</svg>|None: every", "", text) and "nan" not in text.split()
    )
    for svg in re.findall(r"(?s)<svg.*?</svg>", text):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img" and len(root.get("aria-label", "")) > 40


def test_dataset_text_cannot_become_markup(promoted: Path) -> None:
    text = (promoted / "report.html").read_text()
    assert HOSTILE not in text and "<b>now</b>" not in text
    assert "&lt;script&gt;alert(" in text


def test_hostile_names_are_escaped_everywhere(tmp_path: Path) -> None:
    out = fake(tmp_path, passed=False)
    rehearsal = json.loads((out / "rehearsal.json").read_text())
    rehearsal["stages"][2] = stage(f"evaluation {HOSTILE}", 1, 2, "failed", error='"><svg onload=x>')
    rehearsal["versions"] = {HOSTILE: HOSTILE}
    write_json(out / "rehearsal.json", rehearsal)
    page = Page(report.render(out, report.build(out)))
    assert "script" not in page.tags and "onload" not in [name for name, _ in page.attributes]


def test_missing_and_broken_figures_are_absent_with_a_reason(tmp_path: Path) -> None:
    out = fake(tmp_path)
    (out / "drills/outage.json").unlink()
    (out / "stress/load/summary.json").write_text("{")
    (out / "dataset/kubectl.json").write_text('{"examples": NaN, "rejected": null, "digest": "sha256:0"}')
    (out / "runs/kubectl/tuning.json").write_text('{"seconds": "long", "tokens_per_second": 1e999, "steps": [1, NaN]}')
    loss = json.loads((out / "drills/replica-loss.json").read_text())
    del loss["recovery_seconds"]
    loss |= {
        "failure": "replica-0 did not come back",
        "absent": {"recovery_seconds": "replica-0 not ready within 60 s"},
    }
    write_json(out / "drills/replica-loss.json", loss)
    (out / "drills/long-prompts.json").write_text('{"multiplier": 4, "absent": {}}')
    assert report.main([str(out)]) == exits.OK
    found = figures_of(out)
    absent = found["absent"]
    assert absent["drills.outage"] == "file drills/outage.json was not written"
    assert absent["stress"].startswith("file stress/load/summary.json cannot be read")
    assert absent["dataset.examples"] == "file dataset/kubectl.json: nan instead of a value"
    assert absent["dataset.rejected"] == "file dataset/kubectl.json: null instead of a value"
    assert absent["tuning.seconds"] == "file runs/kubectl/tuning.json: expected number at seconds, found long"
    assert "tuning.tokens_per_second" in absent and "tuning.steps" in absent
    assert absent["drills.replica_loss.recovery_seconds"] == "replica-0 not ready within 60 s"
    assert absent["drills.long_prompts.short_p95_ratio"] == "file drills/long-prompts.json has no short_p95_ratio"
    for path in (
        "dataset.examples",
        "tuning.seconds",
        "stress",
        "drills.outage",
        "drills.replica_loss.recovery_seconds",
    ):
        assert report.get(found, path) is None
    assert "drill replica loss: replica-0 did not come back" in found["verdict"]["notes"]
    page = (out / "report.html").read_text()
    assert "replica-0 not ready within 60 s" in page and "file drills/outage.json was not written" in page


def test_no_number_in_the_report_is_unlike_a_number(promoted: Path) -> None:
    def walk(value: Any) -> list[Any]:
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return [value, *(item for part in parts for item in walk(part))]

    everything = walk(figures_of(promoted))
    assert None not in everything
    assert all(math.isfinite(value) for value in everything if isinstance(value, float))


def test_an_empty_folder_still_gives_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path)]) == exits.OK
    found = figures_of(tmp_path)
    assert found["verdict"]["status"] == "incomplete"
    assert {"dataset", "tuning", "evaluation", "promotion", "stress", "drills.outage", "versions", "stages"} <= set(
        found["absent"]
    )
    assert "not complete" in capsys.readouterr().out


def test_a_stopped_chain_names_its_stage(tmp_path: Path) -> None:
    write_json(
        tmp_path / "rehearsal.json",
        {
            "main": "kubectl",
            "stages": [
                stage("dataset", 0, 1, "failed", error="kubectl.jsonl:7: empty output"),
            ],
        },
    )
    found = report.build(tmp_path)
    assert found["verdict"]["status"] == "stopped" and "dataset" in found["verdict"]["headline"]
    assert found["absent"]["dataset"] == "stage dataset: failed: kubectl.jsonl:7: empty output"
    assert found["absent"]["tuning"] == "not reached: stage dataset: failed: kubectl.jsonl:7: empty output"
    assert "kubectl.jsonl:7" in report.render(tmp_path, found)


def test_a_stop_after_the_promotion_is_in_the_headline(tmp_path: Path) -> None:
    write_json(tmp_path / "runs/kubectl/evaluation.json", evaluation(True, "x"))
    write_json(tmp_path / "promotions/kubectl.json", {"adapter": "kubectl", "digest": "sha256:0"})
    stages = [stage("serving", 0, 9), stage("stress", 9, 1, "failed", error="the router does not answer")]
    write_json(tmp_path / "rehearsal.json", {"main": "kubectl", "stages": stages})
    found = report.build(tmp_path)
    headline = "kubectl beat its base and is promoted; the run stopped later, in stage stress"
    assert (found["verdict"]["status"], found["verdict"]["headline"]) == ("promoted", headline)
    assert found["absent"]["promotion.seconds_to_all_replicas"].endswith("has no seconds_to_all_replicas")
    assert found["absent"]["stress"] == "stage stress: failed: the router does not answer"
    assert found["absent"]["drills.outage"] == "not reached: stage stress: failed: the router does not answer"


def test_a_missing_folder_is_an_input_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(tmp_path / "nothing")]) == exits.INPUT
    assert "no such folder" in capsys.readouterr().err


def test_plots_hold_the_series_and_the_marks_of_the_drills(promoted: Path) -> None:
    text = (promoted / "report.html").read_text()
    series = (
        *("loss-series", "speed-series", "score-base", "score-adapter", "gain-exact_match", "gain-minimum"),
        *("timeline-ttft-p50-load", "timeline-ttft-p95-replica-loss", "timeline-rps-load", "timeline-rps-outage"),
        *("timeline-failed-replica-loss", "latency-time-to-first-token", "latency-whole-answer", "phases-engine"),
    )
    for name in series:
        assert f'id="{name}"' in text, name
    assert 'id="timeline-failed-load"' not in text  # nothing failed there
    marks = re.findall(r'id="timeline-mark-rps-replica-loss-([^"]+)"', text)
    assert marks == ["1-2", "3", "4"]  # killed and restarted are a second apart: one line
    assert "replica-0 killed, replica-0 restarted" in text


def test_marks_that_cannot_be_told_apart_share_a_line() -> None:
    sent = [plots.Sent(100.0 + second, 100.5 + second, 50.0, False) for second in range(100)]
    episode = plots.Episode("outage", sent, [(150.0, "c"), (110.0, "a"), (112.0, "b")])
    assert [(mark.label, mark.seconds, mark.names) for mark in plots.marks(episode)] == [
        ("1-2", 10.0, ["a", "b"]),
        ("3", 50.0, ["c"]),
    ]


@pytest.mark.parametrize("odd_shapes", ["x", 7, [], [None], {"p50": "x"}, True])
def test_odd_values_from_other_versions_do_not_cost_the_report(tmp_path: Path, odd_shapes: Any) -> None:
    values = dict.fromkeys(
        [
            "metric",
            "base",
            "adapter",
            "gain",
            "gain_ci95",
            "min_gain",
            "also",
            "verdict",
            "spec",
            "window",
            "ttft_ms",
            "itl_ms",
            "phases",
            "replicas",
            "killed",
            "events",
            "versions",
            "failures_by_reason",
            "bounds",
            "absent",
            "failure",
            "long_share",
            "baseline",
            "short",
            "long",
        ],
        odd_shapes,
    )
    files = ["dataset/a.json", "runs/a/tuning.json", "runs/a/evaluation.json", "promotions/a.json"]
    files += [
        "stress/load/summary.json",
        *(f"drills/{name}.json" for name in ("long-prompts", "replica-loss", "outage")),
    ]
    for file in files:
        write_json(tmp_path / file, values)
    write_json(
        tmp_path / "rehearsal.json",
        {"main": "a", "stages": [odd_shapes], "versions": odd_shapes, "machine": odd_shapes},
    )
    assert report.main([str(tmp_path)]) == exits.OK
    assert "evaluation.passed" in figures_of(tmp_path)["absent"]
    assert "Absent figures" in (tmp_path / "report.html").read_text()


def test_long_runs_do_not_make_a_large_page() -> None:
    chance = random.Random(1)
    latency = plots.latency({"whole answer": [chance.lognormvariate(5, 0.5) for _ in range(30_000)]})
    loss = plots.loss([{"step": step, "loss": 1 / step} for step in range(1, 20_001)])
    assert len(latency) < 60_000 and len(loss) < 60_000
    assert "in 20000 optimiser steps" in loss and "of 30000 requests" in latency
    shown = report.clip("x" * 5000)
    assert len(shown) < 2100 and shown.endswith("(5,000 characters)")
    assert report.clip(None) == "–"


def test_slow_first_tokens_get_a_logarithmic_axis() -> None:
    sent = [plots.Sent(100.0 + n, 101.0 + n, 20.0 if n < 90 else 20_000.0, False) for n in range(100)]
    assert "TTFT (ms, log scale)" in plots.timeline([plots.Episode("outage", sent)])
    assert "log scale" not in plots.timeline([plots.Episode("load", sent[:90])])


def test_timeline_bins_count_every_request_once() -> None:
    edges = plots._bins(61.0)
    assert edges[0] == 0 and edges[-1] >= 61 and len(edges) <= 42
    counts = [0] * (len(edges) - 1)
    for tenth in range(611):
        counts[plots._bin(edges, tenth / 10)] += 1
    assert sum(counts) == 611 and plots._bin(edges, -1) == 0 and plots._bin(edges, 1e9) == len(edges) - 2


def test_durations_and_figures_read_well() -> None:
    assert [report.duration(value) for value in (0.42, 12.34, 59.96, 185, 7620)] == [
        "0.42 s",
        "12.3 s",
        "1 min 00 s",
        "3 min 05 s",
        "2 h 07 min",
    ]
    assert [report.figure(value) for value in (2400, 0.5, 12.34, 6176.5)] == ["2,400", "0.50", "12.3", "6,176"]


@pytest.mark.parametrize(
    ("slo", "status", "badge"),
    [
        (Slo(), "measured", "Measured"),
        (Slo(error_rate=1), "held", "✓ Held"),
        (Slo(error_rate=1, ttft_p95_ms=1), "not_held", "✗ Not held"),
    ],
)
def test_a_load_by_itself_is_judged_by_its_bounds_and_misses_no_chain(
    tmp_path: Path, slo: Slo, status: str, badge: str
) -> None:
    rows = requests(random.Random(7), 0, 20, 6)
    summary = figures.summary(rows)
    spec = {"users": 3, "duration_seconds": 20, "ramp_seconds": 0, "prompt_tokens": 800, "max_tokens": 64}
    write_jsonl(tmp_path / "stress/load/requests.jsonl", rows)
    write_json(
        tmp_path / "stress/load/summary.json",
        summary
        | {"bounds": figures.bounds(summary, slo), "spec": spec | {"models": {"base": 1.0}}}
        | {"versions": {"locust": "2"}},
    )
    found = report.build(tmp_path)
    assert found["verdict"]["status"] == status
    assert not [path for path in found["absent"] if not path.startswith("stress.")]
    page = report.render(tmp_path, found)
    assert badge in page and ("not_held" in status) == ("verdict bad" in page)
    assert 'id="stress"' in page and 'id="tuning"' not in page and 'id="drills"' not in page
    assert ("ttft_p95_ms" in page) == (slo.ttft_p95_ms is not None)


def test_a_drill_without_a_bound_is_measured_and_holds_nothing(tmp_path: Path) -> None:
    write_json(
        tmp_path / "drills/outage.json", {"drill": "outage", "recovery_seconds": 3500.0, "absent": {}, "events": []}
    )
    write_jsonl(tmp_path / "drills/outage.requests.jsonl", [])
    found = report.build(tmp_path)
    assert (found["verdict"]["status"], found["verdict"]["text"]) == ("measured", "1 measured")
    assert "no bounds were given" in report.render(tmp_path, found)


def test_a_load_at_a_rate_by_several_clients(tmp_path: Path) -> None:
    rows = requests(random.Random(7), 0, 20, 6)
    refused = {"error": "status 429", "status": 429, "retry_after_seconds": 4.0, "ttft_ms": None, "itl_ms": []}
    rows = [
        row | {"client": f"client-{n % 2}", "late_ms": 1.5} | (refused if n % 8 == 1 else {})
        for n, row in enumerate(rows)
    ]
    rows.append(
        rows[0] | {"error": figures.NOT_SENT, "status": None, "ttft_ms": None, "itl_ms": [], "latency_ms": None}
    )
    slo = Slo(shed_rate=0.5, goodput=Goodput(e2e_ms=60_000, min_rps=900))
    summary = figures.summary(rows, objectives=slo.goodput.objectives, by={"client": lambda row: str(row["client"])})
    spec = {"arrivals": "poisson", "requests_per_second": 2.5, "max_in_flight": 9, "users": 4, "duration_seconds": 20}
    spec |= {
        "ramp_seconds": 0,
        "prompt_tokens": 8,
        "max_tokens": 6,
        "models": {"base": 1.0},
        "clients": {"client-0": 1.0},
    }
    more = {"bounds": figures.bounds(summary, slo), "spec": spec, "versions": {"locust": "2"}}
    write_jsonl(tmp_path / "stress/load/requests.jsonl", rows)
    write_json(tmp_path / "stress/load/summary.json", summary | more)
    found = report.build(tmp_path)
    assert found["verdict"]["headline"] == "The load broke its bounds: 1 of 3 bounds held"
    assert "goodput_rps" in found["verdict"]["notes"][1] and "at least 900: not held" in found["verdict"]["notes"][1]
    page = report.render(tmp_path, found)
    assert "2.5 requests/s on average (Poisson" in page and "users in a closed loop" not in page
    assert "1 requests were due but not sent" in page and f"{summary['shed']} shed (429)" in page
    assert "<td>client-1</td>" in page and "at least 900</td>" in page and "Goodput" in page
