"""The serving container's command line: what becomes of its arguments, and its exit codes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import serving.client
import serving.evaluate
import training.publish
from artifacts.store import StoreError
from common import exits
from common.files import write_json, write_jsonl
from serving.__main__ import main
from training.publish import Published

POD = ["router", "--selector", "app=engine", "--namespace", "serving"]


class Become(Exception):
    """Stands for exec: the process is another program from here on."""


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Command line and environment of the program that the process would have become."""
    seen: list[Any] = []

    def execve(path: str, command: list[str], environment: dict[str, str] | None = None) -> None:
        seen.extend((command, environment))
        raise Become

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(os, "execv", execve)
    return seen


def test_router_in_kubernetes(become: list[Any]) -> None:
    arguments = [*POD, "--selector", "pool=a", "--host", "0.0.0.0", "--port", "8080", "--replica-port", "8001"]
    with pytest.raises(Become):
        main(arguments)
    line = " ".join(become[0])
    assert "--host 0.0.0.0 --port 8080 " in line and "--prometheus-host 0.0.0.0 --prometheus-port 29000" in line
    assert "--selector app=engine pool=a --service-discovery-namespace serving --service-discovery-port 8001" in line


def test_router_before_given_replicas(become: list[Any]) -> None:
    with pytest.raises(Become):
        main(["router", "--replica", "http://a:1", "--replica", "http://b:2"])
    assert "--worker-urls http://a:1 http://b:2 " in " ".join(become[0])
    assert "--service-discovery" not in become[0]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["router"], "one of the arguments --replica --selector is required"),
        ([*POD, "--replica", "http://a:1"], "not allowed with argument"),
        (["router", "--selector", "app=engine"], "--selector and --namespace go together"),
        (["router", "--replica", "http://a:1", "--namespace", "n"], "--selector and --namespace go together"),
        (["router", "--selector", "engine", "--namespace", "n"], "'engine': expected KEY=VALUE, such as app=engine"),
    ],
)
def test_what_does_not_go_together_is_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == exits.INPUT
    assert told in capsys.readouterr().err


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    write_json(tmp_path / "serving.json", {"base_model": "/models/base", "store": "s"})
    return tmp_path / "serving.json"


def test_the_engine_is_told_where_the_keys_are(spec: Path, tmp_path: Path, become: list[Any]) -> None:
    with pytest.raises(Become):
        main(["engine", "--spec", str(spec), "--state", str(tmp_path / "state"), "--api-keys", "/secrets/keys.json"])
    command, environment = become
    assert environment["DRYDOCK_API_KEYS"] == "/secrets/keys.json"
    assert environment["PATH"] == os.environ["PATH"]
    assert "/secrets/keys.json" not in command


# Evaluate, then publish.


class Judged:
    """Two runs, of which `passed` tells who passes, and a store that notes what comes to it."""

    def __init__(self, folder: Path) -> None:
        self.runs = [folder / "runs" / name for name in ("one", "two")]
        self.passed = {"one": True, "two": True}
        self.events: list[str] = []
        self.store: Callable[[], None] = lambda: None
        for run in self.runs:
            write_json(run / "spec.json", {"adapter": run.name, "base_model": "b", "dataset": "d"})
            write_jsonl(run / "held_out.jsonl", [{"instruction": "q", "input": "", "output": "a"}])
            write_json(run / "adapter" / "adapter_config.json", {})
            (run / "adapter" / "adapter_model.safetensors").touch()

    def evaluate(self, run: Any, *_: Any, context: int) -> dict[str, Any]:
        assert context == 4096  # the serving spec's default max_model_len
        self.events.append(f"evaluate {run.spec.adapter}")
        passed = self.passed[run.spec.adapter]
        return {"passed": passed, "verdict": "PASSED: better" if passed else "FAILED: not better"}

    def publish(self, run: Path, store: str) -> Published:
        self.store()
        self.events.append(f"publish {run.name} {store}")
        return Published(run.name, "aaaa1111", "sha256:aaaa1111", self.passed[run.name], "verdict")


@contextlib.contextmanager
def no_engine(url: str) -> Iterator[str]:
    yield url


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Judged:
    judged = Judged(tmp_path)
    monkeypatch.setattr(serving.evaluate, "evaluate", judged.evaluate)
    monkeypatch.setattr(training.publish, "publish", judged.publish)
    monkeypatch.setattr(serving.client, "Engine", no_engine)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    return judged


def judge(judged: Judged, spec: Path, *more: str) -> int:
    runs = [word for run in judged.runs for word in ("--run", str(run))]
    return main(["evaluate", "--spec", str(spec), "--server", "http://127.0.0.1:1", *runs, *more])


def test_each_run_is_published_once_it_is_evaluated(
    judged: Judged, spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    judged.passed["one"] = False
    assert judge(judged, spec, "--store", "oci://r.test/team") == exits.GATE
    assert judged.events == [
        "evaluate one", "publish one oci://r.test/team", "evaluate two", "publish two oci://r.test/team",
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert "one: FAILED: not better\none aaaa1111 sha256:aaaa1111: published, a candidate that nobody serves" in out
    assert "two: PASSED: better\ntwo aaaa1111 sha256:aaaa1111: published, promoted" in out
    judged.passed["one"] = True
    assert judge(judged, spec, "--store", "oci://r.test/team") == exits.OK


def test_without_a_store_nothing_is_published(judged: Judged, spec: Path) -> None:
    assert judge(judged, spec) == exits.OK
    judged.passed["two"] = False
    assert judge(judged, spec) == exits.GATE
    assert judged.events == ["evaluate one", "evaluate two"] * 2


def test_a_store_that_fails_is_for_another_attempt(
    judged: Judged, spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise StoreError("oci://r.test/team: gave up after 4 attempts")

    judged.store = fail
    judged.passed["one"] = False
    assert judge(judged, spec, "--store", "oci://r.test/team") == exits.FAILED, "not 3, which is final"
    assert "gave up after 4 attempts" in capsys.readouterr().err


def test_a_mistyped_store_is_told_before_the_evaluation(
    judged: Judged, spec: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judge(judged, spec, "--store", "https://r.test/team") == exits.INPUT
    assert "--store: store 'https://r.test/team': write oci://HOST[:PORT]/PREFIX" in capsys.readouterr().err
    assert judged.events == []


def test_publishing_needs_none_of_the_heavy_packages() -> None:
    """The serving image has torch, but a publication must not take seconds to begin."""
    import subprocess

    told = subprocess.run(
        [sys.executable, "-c", "import sys, training.publish; print(*sys.modules)"],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert not {"torch", "transformers", "peft", "vllm", "azure.identity"} & set(told.stdout.split())
