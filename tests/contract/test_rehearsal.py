"""`make rehearse` as a person meets it when things go wrong: a failed gate, a bad dataset, Ctrl-C, a second one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from artifacts.adapter import promoted_digest
from artifacts.store import open_store
from common.files import read_json, write_json
from tests.contract.conftest import BASE, ROOT, wait_until


def rehearse(out: Path, *specs: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rehearsal", "--out", str(out)]
    for spec in specs:
        command += ["--adapter", str(spec)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def settings(folder: Path, rows: Path, **more: object) -> Path:
    path = folder / "adapter.yaml"
    values = {"adapter": "mine", "base_model": str(BASE), "dataset": str(rows), "max_seq_length": 256}
    write_json(path, values | more)
    return path


def processes_of(out: Path) -> list[str]:
    """Command lines of all processes that name the output folder: what a rehearsal could leave behind."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = " ".join(process.info["cmdline"] or [])
        if str(out) in line and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(line)
    return found


@pytest.mark.timeout(600)
def test_a_useless_adapter_ends_the_rehearsal_with_a_verdict_and_nothing_is_promoted(
    work: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    spec = settings(tmp_path, work / "rows.jsonl", learning_rate=1e-9, num_train_epochs=1)
    rehearsal = rehearse(out, spec)
    shown, _ = rehearsal.communicate(timeout=500)
    assert rehearsal.returncode == 3, shown
    assert "mine: FAILED: exact_match" in shown
    assert "REHEARSAL STOPPED" in shown and "nothing is promoted" in shown
    assert promoted_digest(open_store(out / "registry"), "mine") is None
    report = read_json(out / "report.json")
    assert report["evaluation"]["passed"] is False
    assert report["verdict"]["status"] == "gate_failed"
    assert {"promotion", "stress"}.isdisjoint(report) and report["drills"] == {}
    assert "gate was not passed" in report["absent"]["promotion"]
    assert "FAILED" in (out / "report.html").read_text()
    assert not processes_of(out)


def test_a_bad_dataset_stops_before_anything_is_tuned(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "input": "", "output": "b"}\n{"instruction": "a", "output": ""}\n')
    rehearsal = rehearse(tmp_path / "out", settings(tmp_path, rows))
    shown, _ = rehearsal.communicate(timeout=120)
    assert rehearsal.returncode == 2
    assert f"{rows}:2: found no key 'input'" in shown
    assert not (tmp_path / "out" / "runs").exists()


def test_a_mistyped_setting_is_told_before_anything_is_done(tmp_path: Path) -> None:
    rehearsal = rehearse(tmp_path / "out", settings(tmp_path, tmp_path / "rows.jsonl", lora_rank=8))
    shown, _ = rehearsal.communicate(timeout=60)
    assert rehearsal.returncode == 2
    assert "lora_rank: unknown setting; did you mean lora_r?" in shown


@pytest.mark.timeout(600)
def test_ctrl_c_while_tuning_leaves_no_process_and_the_next_run_resumes(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    spec = settings(tmp_path, work / "rows.jsonl", num_train_epochs=20, logging_steps=1)
    events = out / "runs" / "mine" / "events.jsonl"
    first = rehearse(out, spec)
    wait_until(lambda: events.is_file() and len(events.read_text().splitlines()) >= 3, 120, "three tuning steps")
    os.killpg(first.pid, signal.SIGINT)
    shown, _ = first.communicate(timeout=60)
    assert first.returncode == 130, shown
    assert not processes_of(out)
    checkpoints = sorted((out / "runs" / "mine" / "checkpoints").glob("step-*"))
    assert checkpoints, shown
    stopped_at = json.loads((checkpoints[-1] / "state.json").read_text())["position"]["step"]

    second = rehearse(out, spec)
    wait_until(lambda: json.loads(events.read_text().splitlines()[-1])["step"] > stopped_at, 120, "a step more")
    refused = rehearse(out, spec)
    told, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2 and "another rehearsal" in told
    os.killpg(second.pid, signal.SIGTERM)
    shown, _ = second.communicate(timeout=60)
    assert f"resuming at step {stopped_at} of" in shown
    assert not processes_of(out)


def test_a_rehearsal_that_is_killed_outright_leaves_no_process_either(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rehearsal = rehearse(out, settings(tmp_path, work / "rows.jsonl", num_train_epochs=50, logging_steps=1))
    events = out / "runs" / "mine" / "events.jsonl"
    wait_until(lambda: events.is_file() and events.read_text(), 120, "a tuning step")
    rehearsal.kill()
    rehearsal.communicate()
    wait_until(lambda: not processes_of(out), 30, "all processes gone")
