"""The arranger of the rehearsal: all settings problems before any work, a gate that stops it, and honest resuming."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from common import exits
from common.files import file_digest, read_json, tree_digest, write_json, write_jsonl
from common.processes import ENDING
from common.settings import SettingsError, load_settings
from rehearsal.__main__ import _rehearse as rehearse
from rehearsal.__main__ import main as rehearsal
from rehearsal.chain import Chain, StageFailed, default_specs
from serving.spec import ServingSpec
from stress import report
from tests.unit.file_server import FileServer
from training.spec import TuningSpec


class FakeProcesses:
    """Notes the commands; `codes` gives the exit code of those that contain a word, all others end well."""

    def __init__(self, codes: dict[str, int] | None = None, interrupts: str = "") -> None:
        self.codes, self.interrupts = codes or {}, interrupts
        self.commands: list[list[str]] = []

    def run(self, command: Sequence[str], *, stdout: Path | None = None) -> int:
        self.commands.append(list(command)[2:])
        if self.interrupts and self.interrupts in command:
            raise KeyboardInterrupt
        if stdout:
            stdout.write_text(json.dumps({"examples": 50, "rejected": 0, "digest": "d", "seconds": 0.1}))
        return next((code for word, code in self.codes.items() if word in command), exits.OK)

    def did(self, word: str) -> list[list[str]]:
        return [command for command in self.commands if word in command]


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tuning settings file on a base and a dataset that exist."""
    base = tmp_path / "base"
    base.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (base / name).write_text("{}")
    write_jsonl(tmp_path / "d.jsonl", [{"instruction": "a", "input": "", "output": "b"}])

    def make(name: str, **change: Any) -> Path:
        path = tmp_path / f"{name}.yaml"
        spec = {"adapter": name, "base_model": str(base), "dataset": str(tmp_path / "d.jsonl")} | change
        path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in spec.items()))
        return path

    return make


def chain(tmp_path: Path, *specs: Path, processes: FakeProcesses | None = None) -> Chain:
    made = Chain(list(specs), tmp_path / "out", processes or FakeProcesses())  # type: ignore[arg-type]
    made.out.mkdir(exist_ok=True)
    return made


def stages(out: Path) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in read_json(out / "rehearsal.json")["stages"]}


# Before anything is done.


def test_the_problems_of_all_settings_files_are_told_together(tmp_path: Path, settings: Callable[..., Path]) -> None:
    (tmp_path / "out" / "runs" / "a").mkdir(parents=True)
    made = chain(
        tmp_path, settings("a", lora_r=0), settings("b", lora_rank=8), settings("c"), settings("d", adapter="c"),
        settings("e", base_model="other"), tmp_path / "none.yaml",
    )  # fmt: skip
    with pytest.raises(SettingsError) as caught:
        made.run()
    told = "\n".join(caught.value.problems)
    assert "a.yaml:4: lora_r: should be greater than or equal to 1, found 0" in told
    assert "b.yaml:4: lora_rank: unknown setting" in told
    assert "none.yaml: no such file" in told
    assert "adapter: c: named by two settings files" in told
    assert f"base_model: {tmp_path}/base, other: the adapters of one pool share one base" in told
    assert not made.processes.commands  # type: ignore[attr-defined]
    assert (tmp_path / "out" / "runs" / "a").is_dir(), "nothing was cleared for a rehearsal that cannot begin"


def test_a_dataset_from_elsewhere_is_fetched_once_for_all_that_comes_after(
    tmp_path: Path, settings: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRYDOCK_CACHE", str(tmp_path / "cache"))
    server = FileServer((tmp_path / "d.jsonl").read_bytes())
    try:
        spec = settings("a", dataset=f"{server.url}/d.jsonl?sig=S3CR3T")
        made = chain(tmp_path, spec)
        made._prepare()
        words = made._load()
        kept = Path(words[words.index("--dataset") + 1])
        assert kept.read_bytes() == (tmp_path / "d.jsonl").read_bytes()
        run = {"fingerprint": made.tuning[0].fingerprint(dataset_digest=file_digest(kept), base_revision=tree_digest(tmp_path / "base"))}  # fmt: skip
        write_json(made.run_folder(made.tuning[0]) / "run.json", run)
        assert fresh(chain(tmp_path, spec)) == [False], "an interrupted run is known again"
        server.fault = lambda _: {"status": 404}
        with pytest.raises(SettingsError, match=r"no such file \(404 Not Found\)"):
            chain(tmp_path, settings("b", dataset=f"{server.url}/gone.jsonl")).run()
    finally:
        server.close()


@pytest.mark.parametrize("out", ["a file", "below a file"])
def test_an_output_folder_that_cannot_be_is_told(tmp_path: Path, out: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    path = file if out == "a file" else file / "out"
    before = {number: signal.getsignal(number) for number in ENDING}
    try:
        assert rehearsal(["--out", str(path)]) == exits.INPUT
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert capsys.readouterr().err.startswith(f"--out: {path}: cannot be written to: ")


def test_a_folder_with_other_peoples_files_is_left_alone(tmp_path: Path, settings: Callable[..., Path]) -> None:
    """`--out .` in a project that has a folder `runs` or `logs` of its own must not cost it that folder."""
    mine = tmp_path / "out" / "runs" / "years-of-work"
    mine.mkdir(parents=True)
    with pytest.raises(SettingsError, match="name a new folder"):
        chain(tmp_path, settings("a"))._prepare()
    assert mine.is_dir()


def test_what_others_write_into_the_same_folder_stays_and_is_in_nobodys_way(
    tmp_path: Path, settings: Callable[..., Path]
) -> None:
    """`make local`, `make render` and `make bench-tuning` write into out/ as well."""
    for name in ("local.json", "local/lock", "render/dev.yaml", "bench-tuning/spec.json"):
        write_json(tmp_path / "out" / name, {})
    chain(tmp_path, settings("a"))._prepare()
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left >= {"local.json", "local", "render", "bench-tuning"}


def test_the_rehearsals_own_settings_fit_together(tmp_path: Path) -> None:
    specs = [load_settings(path, TuningSpec) for path in default_specs()]
    assert len(specs) >= 2
    assert len({spec.adapter for spec in specs}) == len(specs)
    assert len({spec.base_model for spec in specs}) == 1
    assert all(Path(spec.dataset).is_file() for spec in specs)


# The gate.


def test_a_failed_gate_ends_the_rehearsal_with_its_code_and_promotes_nothing(
    tmp_path: Path, settings: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    processes = FakeProcesses({"evaluate": exits.GATE})
    made = chain(tmp_path, settings("a"), settings("b"), processes=processes)
    with pytest.raises(StageFailed, match="nothing is promoted") as caught:
        made.run()
    assert caught.value.code == exits.GATE
    assert not processes.did("publish")
    assert stages(made.out) == {"dataset": "ok", "tuning": "ok", "evaluation": "gate_failed"}
    assert read_json(made.out / "rehearsal.json")["status"] == "gate_failed"
    assert not (made.out / "registry").exists()


def test_the_command_ends_with_3_after_a_failed_gate_and_still_reports(
    tmp_path: Path, settings: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "main", lambda arguments: 0)
    made = chain(tmp_path, settings("a"), processes=FakeProcesses({"evaluate": exits.GATE}))
    assert rehearse(made, keep=False) == exits.GATE
    assert "REHEARSAL STOPPED" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "stage", "code"),
    [("check", "dataset", exits.INPUT), ("tune", "tuning", exits.FAILED), ("evaluate", "evaluation", exits.FAILED)],
)
def test_a_stage_that_fails_ends_the_rehearsal_with_its_code(
    tmp_path: Path, settings: Callable[..., Path], word: str, stage: str, code: int
) -> None:
    made = chain(tmp_path, settings("a"), processes=FakeProcesses({word: code}))
    with pytest.raises(StageFailed) as caught:
        made.run()
    assert caught.value.code == code
    assert stages(made.out)[stage] == "failed"
    assert list(stages(made.out))[-1] == stage, "nothing after it"


# What it runs.


def test_every_adapter_is_checked_and_tuned_by_the_containers_entry_points_and_evaluated_on_one_server(
    tmp_path: Path, settings: Callable[..., Path]
) -> None:
    processes = FakeProcesses()
    specs = settings("a", lora_r=4), settings("b", lora_r=24)
    made = chain(tmp_path, *specs, processes=processes)
    made._prepare()
    for stage in (made.dataset, made.tune, made.evaluate):
        stage()
    assert [command[:2] for command in processes.commands] == [
        ["training", "check"], ["training", "check"], ["training", "tune"], ["training", "tune"], ["serving", "evaluate"],
    ]  # fmt: skip
    assert processes.commands[4].count("--run") == 2
    assert [read_json(made.out / "dataset" / f"{name}.json")["examples"] for name in "ab"] == [50, 50]
    pool = load_settings(made.out / "serving.yaml", ServingSpec)
    assert pool.adapters == ("a", "b")
    assert pool.max_lora_rank == 24, "the largest among the adapters"
    assert pool.store == str(made.out / "registry")
    assert pool.base_model == str(tmp_path / "base")


# Resuming.


def fresh(made: Chain) -> list[bool]:
    """Whether each adapter would be tuned from the start, after a new rehearsal's preparations."""
    made._prepare()
    made.tune()
    return ["--fresh" in command for command in made.processes.did("tune")]  # type: ignore[attr-defined]


def begun(tmp_path: Path, settings_file: Path, out: Path) -> None:
    """Leave the files of a tuning under way, as the training container does."""
    spec = load_settings(settings_file, TuningSpec)
    digest, revision = file_digest(tmp_path / "d.jsonl"), tree_digest(tmp_path / "base")
    run = out / "runs" / spec.adapter
    write_json(run / "run.json", {"fingerprint": spec.fingerprint(dataset_digest=digest, base_revision=revision)})


def interrupted(tmp_path: Path, *specs: Path) -> None:
    """A rehearsal that Ctrl-C ended in its evaluation."""
    made = chain(tmp_path, *specs, processes=FakeProcesses(interrupts="evaluate"))
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert read_json(made.out / "rehearsal.json")["status"] == "interrupted"
    for spec in specs:
        begun(tmp_path, spec, made.out)


def test_after_ctrl_c_the_tuning_goes_on_where_it_was(tmp_path: Path, settings: Callable[..., Path]) -> None:
    specs = settings("a"), settings("b")
    interrupted(tmp_path, *specs)
    assert fresh(chain(tmp_path, *specs)) == [False, False]


def test_after_the_rehearsal_was_killed_outright_it_goes_on_as_well(
    tmp_path: Path, settings: Callable[..., Path]
) -> None:
    spec = settings("a")
    made = chain(tmp_path, spec)
    made._prepare()  # and then nothing more was written
    begun(tmp_path, spec, made.out)
    assert fresh(chain(tmp_path, spec)) == [False]


def test_other_settings_data_or_base_begin_anew_and_the_rest_resumes(
    tmp_path: Path, settings: Callable[..., Path]
) -> None:
    interrupted(tmp_path, settings("a"), settings("b"))
    assert fresh(chain(tmp_path, settings("a", lora_r=8), settings("b", logging_steps=1))) == [True, False]
    interrupted(tmp_path, settings("a"))
    (tmp_path / "base" / "config.json").write_text('{"x": 1}')
    assert fresh(chain(tmp_path, settings("a"))) == [True]
    interrupted(tmp_path, settings("a"))
    write_jsonl(tmp_path / "d.jsonl", [{"instruction": "c", "input": "", "output": "d"}])
    assert fresh(chain(tmp_path, settings("a"))) == [True]


def test_a_rehearsal_that_ended_is_done_anew(tmp_path: Path, settings: Callable[..., Path]) -> None:
    spec = settings("a")
    for status in ("finished", "failed", "gate_failed"):
        made = chain(tmp_path, spec)
        begun(tmp_path, spec, made.out)
        write_json(made.out / "rehearsal.json", {"status": status})
        assert fresh(made) == [True], status


def test_what_an_earlier_rehearsal_left_never_shows_up_in_the_next_report(
    tmp_path: Path, settings: Callable[..., Path]
) -> None:
    out = tmp_path / "out"
    for name in ("stress/load/summary.json", "drills/outage.json", "promotions/a.json", "registry/adapters/a/index.json",
                 "rehearsal.json", "report.json", "fleet.json", "dataset/a.json"):  # fmt: skip
        write_json(out / name, {})
    write_json(out / "mine.json", {})
    chain(tmp_path, settings("a"))._prepare()
    assert sorted(path.name for path in out.iterdir()) == ["mine.json", "rehearsal.json"]


def test_the_record_says_on_what_and_with_which_versions(tmp_path: Path, settings: Callable[..., Path]) -> None:
    made = chain(tmp_path, settings("a"), settings("b"))
    made._prepare()
    record = read_json(made.out / "rehearsal.json")
    assert record["main"] == "a"
    assert {"python", "torch", "transformers", "peft", "locust"} <= set(record["versions"])
    assert record["machine"]["cpu_count"] >= 1
