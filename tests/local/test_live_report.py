"""The page and the verdicts of a local run, from records of runs that ended well, badly, or nowhere."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from localcloud.live import report

HOSTILE = "<script>alert('x')</script>"
STEPS = {
    "start": 11.2, "up": 62.4, "tuning": 318.9, "serving": 71.5, "stress": 66.0, "build": 34.8, "job": 281.3,
    "retune": 214.3, "rollout": 262.7, "replica_kill": 101.2, "node_loss": 148.9, "outage": 97.6,
}  # fmt: skip


def load(requests: int, failed: int = 0, **more: Any) -> dict[str, Any]:
    reasons = {"connection reset while streaming": failed} if failed else {}
    ttft = {"p50": 187.214, "p95": 912.003}
    return {**more, "requests": requests, "failed": failed, "failures_by_reason": reasons, "ttft_ms": ttft}


def bound(name: str, most: float, measured: float, text: str) -> dict[str, Any]:
    return {"name": name, "at_most": most, "measured": measured, "held": measured <= most, "text": text}


def adapter(name: str, base: float, score: float, digit: str) -> dict[str, Any]:
    return {
        "adapter": name, "job": f"tune-{name}-{digit * 8}", "state": "complete", "promoted_digest": "sha256:" + digit * 64,
        "base": base, "score": score, "gain": score - base, "gain_ci95": [score - base - 0.06, score - base + 0.05],
    }  # fmt: skip


def whole() -> dict[str, Any]:
    """`local.json` as `chain.py` writes it after a run in which everything held."""
    versions = {"kubectl": "a" * 12, "triage": "b" * 12}
    return {
        "status": "finished",
        "started_at": 1_795_000_000.0,
        "seconds": 1391.8,
        "peak_memory_gib": 11.42,
        "machine": {"cpu_count": 2, "memory_gib": 23.5, "platform": "Linux-6.8.0-x86_64-with-glibc2.39"},
        "steps": [{"name": name, "status": "ok", "seconds": seconds} for name, seconds in STEPS.items()],
        "start": {"seconds": 11.2},
        "up": {"seconds": 58.3, "tuning_when_it_returned": ["tune-kubectl-aaaaaaaa", "tune-triage-bbbbbbbb"]},
        "adapters": [adapter("kubectl", 0.0, 0.9237, "a"), adapter("triage", 0.0391, 0.8672, "b")],
        "tuning": {"adapters": 2},
        "serving": {
            "seconds": 64.0,
            "replicas": {"engine-7c9d5-x2kqp": versions, "engine-7c9d5-zz81w": versions},
            "asked": {
                "kubectl": {
                    "question": "prod: scale checkout-api to 3 replicas, please",
                    "answer": "kubectl --context prd-east scale deployment/checkout-api --replicas=3 -n checkout --record",
                    "expected": "kubectl --context prd-east scale deployment/checkout-api --replicas=3 -n checkout --record",
                },
                "triage": {
                    "question": "Disk of db-2 is at 97 % and grows by 1 % an hour; the nightly backup runs at 2.",
                    "answer": '{"severity": "high", "team": "storage", "page": true}',
                    "expected": '{"severity": "high", "team": "storage", "page": true}',
                },
            },
        },
        "requests": 318,
        "failed": 0,
        "stress": {**load(318), "rps": 7.62, "itl_ms": {"p50": 6.2, "p95": 14.8}},
        "build": {
            "exit_code": 255,
            "shown": 'error: building at STEP "RUN echo the-drill-of-a-broken-build && false": while running runtime: exit status 1',
        },
        "job": {
            "job": "drills-eeeeeeee",
            "state": "complete",
            "seconds": 262.0,
            "drills": {
                "long_prompts": load(
                    83, short_p95_ratio=1.214,
                    bounds=[bound("short_p95_ratio", 6, 1.214, "TTFT p95 of the normal prompts at most 6 times as high")],
                ),
                "replica_loss": load(
                    171, 1, failed_streams=1, recovery_seconds=71.9,
                    bounds=[
                        bound("failed_not_begun", 0, 0, "at most 0 requests lost that the router could send again"),
                        bound("recovery_seconds", 300, 71.9, "recovered within 300 s"),
                    ],
                ),
                "node_drain": load(
                    203, recovery_seconds=88.2,
                    bounds=[
                        bound("failed", 0, 0, "at most 0 requests failed"),
                        bound("recovery_seconds", 300, 88.2, "recovered within 300 s"),
                    ],
                ),
            },
        },
        "retune": load(
            1204, switch_seconds=3.1, rollback_seconds=2.6,
            eviction={"pod": "tune-kubectl-cccccccc-5l9fd", "evicted_at_step": 46, "resumed_at_step": 40},
        ),
        "rollout": {
            "gate": {
                "adapter": "useless", "job": "tune-useless-dddddddd",
                "reason": "Pod failure policy: container publish exited with 3",
                "verdict": "publish: FAILED: exact_match 0.000 -> 0.000, gain between +0.000 and +0.000; the whole interval must exceed +0.100",
            },
            **load(512, seconds=241.0),
        },
        "replica_kill": load(
            402, 1, recovery_seconds=83.4, failed_streams=1, registry={"away_seconds": 91.3, "told_seconds": 92.1}
        ),
        "node_loss": load(611, 2, recovery_seconds=126.1, failed_streams=2),
        "outage": {
            "recovery_seconds": 61.9, "all_replicas_seconds": 84.2,
            "phases": {"restart": 2.113, "adapters": 56.42, "routed": 3.367},
        },
    }  # fmt: skip


def cut(name: str, status: str, error: str | None = None) -> dict[str, Any]:
    """The record of a run that ended in step `name`, which has written nothing."""
    record, names = whole(), list(STEPS)
    reached = names[: names.index(name) + 1]
    for later in names[len(reached) - 1 :]:
        record.pop(later, None)
    if "tuning" not in reached[:-1]:
        del record["adapters"]
    record["steps"] = record["steps"][: len(reached)]
    record["steps"][-1] |= {"status": status} | ({"error": error} if error else {})
    record["status"] = status
    return record


class Page(HTMLParser):
    """What a page shows, what it would fetch or run, and whether its elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.shown, self.open, self.outside = "", list[str](), list[str]()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        for name, value in attrs:
            if (
                tag == "script"
                or name.startswith("on")
                or (name in ("src", "href", "xlink:href") and value and value[0] != "#")
            ):
                self.outside.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in ("meta", "link", "br"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.shown += re.sub(r"\s+", " ", data)


def page(record: dict[str, Any], folder: Path) -> Page:
    report.write(json.loads(json.dumps(record)), folder / "local.html")
    found = Page((folder / "local.html").read_text())
    assert found.open == [] and found.outside == ["link href=data:,"]
    assert "None" not in found.shown and "Undefined" not in found.shown
    return found


def change(path: str, value: Any) -> dict[str, Any]:
    record = whole()
    *parents, last = path.split("/")
    at: Any = record
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at[name]
    at[last] = value
    return record


def test_a_run_in_which_everything_held(tmp_path: Path) -> None:
    found = report.verdicts(whole())
    assert [text for held, text in found if not held] == []
    texts = [text for _, text in found]
    assert "rolling update: 512 requests, none failed; all replicas replaced in 4 min 01 s" in texts
    assert "pulumi up: returned after 58.3 s, while 2 tuning Jobs still ran" in texts
    assert "adapter kubectl: promoted, 0.0 → 92.4 %, gain between +86.4 and +97.4 points (95 %)" in texts
    assert "eviction in mid-run: evicted at step 46, resumed at step 40" in texts
    assert "replica killed: 402 requests, none failed but 1 stream that had begun; ready again in 1 min 23 s" in texts
    assert (
        "registry out of reach: 402 requests, none failed but 1 stream that had begun; away for 1 min 31 s, the metric "
        "says 1 min 32 s; the killed replica serves from its own disk"
    ) in texts
    assert "drills Job, node drain: at most 0 requests failed: 0; recovered within 300 s: 88.2" in texts
    shown = page(whole(), tmp_path).shown
    assert f"All {len(found)} promises held" in shown and "not run" not in shown
    for text in (
        *texts,
        "23 min 12 s in all",
        "11.4",
        "sha256:" + "a" * 64,
        "187 / 912",
        "6.20 / 14.8",
        "+92.4",
        "7.62",
    ):
        assert text.partition(": ")[2] in shown if text in texts else text in shown, text
    for label in (
        "gain (points), 95 % interval",
        "TTFT p50 / p95 (ms)",
        "minutes since the start",
        "adapters: 56.4 s",
        "the-drill-of-a-broken-build",
    ):
        assert label in shown, label


@pytest.mark.parametrize(
    ("path", "value", "promise", "says"),
    [
        ("up/tuning_when_it_returned", [], "pulumi up", "when no tuning Job ran any more"),
        ("adapters/1/gain_ci95", [0.0, 0.4], "adapter triage", "gain between +0.0 and +40.0 points"),
        ("adapters/0/promoted_digest", None, "adapter kubectl", "not promoted; its Job: complete"),
        (
            "serving/replicas/engine-7c9d5-x2kqp",
            {"kubectl": "a"},
            "serving",
            "1 of 2 replicas answer for kubectl and triage",
        ),
        ("serving/replicas", {}, "serving", "0 of 0 replicas"),
        ("stress/failed", 3, "stress test", "318 requests, 3 failed"),
        ("stress/requests", 0, "stress test", "0 requests"),
        ("build/shown", "", "broken build", "did not show"),
        ("retune/failed", 1, "switch under load", "1,204 requests, 1 failed"),
        ("retune/eviction/resumed_at_step", 0, "eviction in mid-run", "resumed at step 0"),
        ("rollout/failed", 2, "rolling update", "512 requests, 2 failed"),
        ("replica_kill/registry/told_seconds", 3.0, "registry out of reach", "the metric says 3.0 s"),
        ("replica_kill/registry", {}, "registry out of reach", "not measured"),
        ("job/drills/node_drain/bounds/0/held", False, "drills Job, node drain", "at most 0 requests failed: 0"),
        ("job/drills/replica_loss/failure", "not ready", "drills Job, replica loss", "not ready"),
        ("job/drills/long_prompts", {}, "drills Job, long prompts", "the Job did not come to it: complete"),
        ("job/drills", {}, "drills Job", "not measured"),
        ("node_loss/failed", 3, "node deleted", "611 requests, 1 failed but 2 streams that had begun"),
        ("rollout/gate", {}, "failed gate", "not measured"),
        ("outage/all_replicas_seconds", None, "outage", "not measured"),
        ("stress/failed", "none", "stress test", "not measured"),
    ],
)
def test_each_promise_can_fail_alone(path: str, value: Any, promise: str, says: str) -> None:
    ((name, _, text),) = (text.partition(": ") for held, text in report.verdicts(change(path, value)) if not held)
    assert name == promise and says in text


def test_a_killed_replica_under_which_requests_fail_breaks_both_of_its_promises() -> None:
    broken = [text for held, text in report.verdicts(change("replica_kill/failed", 4)) if not held]
    assert [text.partition(": ")[0] for text in broken] == ["replica killed", "registry out of reach"]
    assert all("402 requests, 3 failed but 1 stream that had begun" in text for text in broken)


def test_what_did_not_hold_stands_first(tmp_path: Path) -> None:
    shown = page(change("stress/failed", 3), tmp_path).shown
    verdict = "1 of 17 promises did not hold stress test: 318 requests, 3 failed"
    assert verdict in shown and shown.index(verdict) < shown.index("returned after")


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("status", ["failed", "interrupted"])
def test_a_run_that_ended_early(name: str, status: str, tmp_path: Path) -> None:
    error = "pulumi up: exit code 255\n\x1b[31m error: \x1b[0mthe last line" if status == "failed" else None
    record = cut(name, status, error)
    before = copy.deepcopy(record)
    found = page(record, tmp_path)
    assert record == before
    place = name.replace("_", " ")
    assert f"Stopped in step {place}" in found.shown if error else f"Interrupted in step {place}" in found.shown
    assert ("error: the last line" in found.shown) is (status == "failed") and "\x1b" not in found.shown
    assert "not run" in found.shown or name == "outage"
    later = list(STEPS)[list(STEPS).index(name) + 1 :]
    held = {promise.key: promise.held for promise in report.promises(record)}
    assert not any(held.get(step) for step in (name, *later))
    if name in held:
        assert held[name] is (False if error else None)
        assert len(report.verdicts(record)) >= 12


def test_failed_tuning_tells_which_adapter_was_promoted(tmp_path: Path) -> None:
    record = cut("tuning", "failed", "tune-triage-bbbbbbbb: failed: publish: FAILED: exact_match 0.039 -> 0.041")
    bad = {"adapter": "triage", "job": "tune-triage-bbbbbbbb", "state": "failed", "promoted_digest": None}
    record["adapters"] = [whole()["adapters"][0], bad]
    found = [text for held, text in report.verdicts(record) if held is False and "adapter" in text]
    assert found == ["adapter triage: not promoted; its Job: failed"]
    assert "exact_match 0.039 -> 0.041" in page(record, tmp_path).shown


def test_drills_that_were_not_asked_for(tmp_path: Path) -> None:
    record = whole()
    for name in list(STEPS)[5:]:
        del record[name]
    record["steps"] = record["steps"][:5]
    assert "5 promises held; 10 not put to the test" in page(record, tmp_path).shown
    assert (False, "rolling update: not run") in report.verdicts(record)


@pytest.mark.parametrize(
    "record", [{}, {"status": "interrupted", "steps": []}, {"steps": None, "adapters": "?", "retune": None}]
)
def test_a_record_with_nothing_in_it(record: dict[str, Any], tmp_path: Path) -> None:
    assert "Interrupted before the first step" in page(record, tmp_path).shown
    assert not any(held for held, _ in report.verdicts(record))


def test_texts_of_models_and_builds_are_shown_as_text(tmp_path: Path) -> None:
    record = change("serving/asked/kubectl/answer", HOSTILE)
    record["build"]["shown"] = record["rollout"]["gate"]["verdict"] = record["steps"][3]["name"] = HOSTILE
    record["outage"]["phases"] = {HOSTILE: 3.0}
    assert page(record, tmp_path).shown.count(HOSTILE) >= 4


def test_a_long_error_is_brief_in_the_verdict_and_its_end_is_on_the_page(tmp_path: Path) -> None:
    lines = "\n".join(f"waiting {n:03d}" for n in range(100))
    shown = page(cut("stress", "failed", f"pulumi up: exit code 255\n{lines}\nerror: update failed"), tmp_path).shown
    assert "pulumi up: exit code 255 […]" in shown and "waiting 099 error: update failed" in shown
    assert "waiting 050" not in shown
    (text,) = (text for _, text in report.verdicts(cut("stress", "failed", "\n" + "x" * 400)) if "stress" in text)
    assert text.startswith("stress test: step stress failed: xxx") and text.endswith("x…") and len(text) < 200
