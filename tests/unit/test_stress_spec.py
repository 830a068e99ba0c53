"""The load's settings: defaults, texts of errors, and what importing them costs; the command line's refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from common.settings import SettingsError, explain
from stress.__main__ import SCALARS, main
from stress.client import api_keys, check_target, is_loopback
from stress.spec import Goodput, LoadSpec, Slo
from tests.unit.test_stress_fake import ROOT, write_dataset


def problems(**values: object) -> str:
    with pytest.raises(ValidationError) as caught:
        LoadSpec.model_validate(values)
    return "\n".join(explain(caught.value, LoadSpec))


def test_models_as_list_or_weights() -> None:
    assert LoadSpec.model_validate({"models": ["kubectl", "triage"]}).models == {"kubectl": 1.0, "triage": 1.0}
    assert LoadSpec.model_validate({"models": {"kubectl": 3}}).models == {"kubectl": 3.0}
    assert LoadSpec.model_validate({"models": "kubectl"}).models == {"kubectl": 1.0}


def test_all_problems_are_told_with_value_and_limit() -> None:
    told = problems(models=["a"], users=0, stream_share=2, prompt_token=10)
    assert "users: should be greater than or equal to 1, found 0" in told
    assert "stream_share: should be less than or equal to 1, found 2" in told
    assert "did you mean prompt_tokens?" in told
    assert "models: required, but absent" in problems()
    assert "names one twice" in problems(models=["a", "a"])
    assert "empty name" in problems(models=[" "])
    assert "raise max_requests to 8" in problems(models=["a"], users=8, max_requests=3)


def test_bounds_are_checked_as_the_rest() -> None:
    told = problems(models=["a"], slo={"ttft_p95_ms": 0, "error_rate": 2, "rps": 3})
    assert "slo.ttft_p95_ms: should be greater than 0, found 0" in told
    assert "slo.error_rate: should be less than or equal to 1, found 2" in told
    assert "slo.rps: unknown setting" in told
    assert LoadSpec.model_validate({"models": ["a"]}).slo == Slo()


def test_what_several_workers_share_is_enough_for_each() -> None:
    told = problems(models=["a"], users=4, workers=8)
    assert "workers is 8, but there are only 4 users to share: lower workers" in told
    # one worker has three users, and sends no more than two requests
    assert "raise max_requests to 6" in problems(models=["a"], users=5, workers=2, max_requests=5)
    poisson = {"models": ["a"], "arrivals": "poisson", "requests_per_second": 9, "workers": 4}
    assert "max_in_flight is 3, which they share: raise it to 4" in problems(**poisson, max_in_flight=3)
    assert "max_requests is 3, which they share: raise it to 4" in problems(**poisson, max_requests=3)
    assert "workers: should be less than or equal to 64, found 65" in problems(**poisson | {"workers": 65})
    assert LoadSpec.model_validate(poisson | {"users": 1}).workers == 4  # there are no users
    assert LoadSpec.model_validate({"models": ["a"], "users": 3}).workers == 1


def test_the_parts_of_a_load_are_the_load() -> None:
    spec = LoadSpec.model_validate(
        {"models": ["a"], "arrivals": "poisson", "requests_per_second": 9, "workers": 4, "max_in_flight": 10,
         "max_requests": 7}
    )  # fmt: skip
    parts = [spec.part(index, 4) for index in range(4)]
    assert [part.max_in_flight for part in parts] == [3, 3, 2, 2]
    assert [part.max_requests for part in parts] == [2, 2, 2, 1]
    assert {part.requests_per_second for part in parts} == {2.25}
    closed = LoadSpec.model_validate({"models": ["a"], "workers": 2})
    assert closed.part(0, 2).requests_per_second is None and closed.part(1, 2).seed == closed.seed


def test_arrivals_need_what_they_are_made_of() -> None:
    assert "requests_per_second is required" in problems(models=["a"], arrivals="poisson")
    assert "set arrivals to poisson" in problems(models=["a"], requests_per_second=3)
    told = problems(models=["a"], arrivals="open", max_in_flight=0)
    assert "arrivals: should be 'closed' or 'poisson'" in told and "max_in_flight" in told
    spec = LoadSpec.model_validate(
        {"models": ["a"], "arrivals": "poisson", "requests_per_second": 3, "max_requests": 2}
    )
    assert LoadSpec.model_validate_json(spec.model_dump_json()) == spec


def test_goodput_is_of_something() -> None:
    assert "give ttft_ms, tpot_ms or e2e_ms" in problems(models=["a"], slo={"goodput": {"min_rps": 1}})
    assert "did you mean ttft_ms?" in problems(models=["a"], slo={"goodput": {"ttft": 1}})
    assert Goodput(ttft_ms=5, min_share=0.9).objectives == {"ttft_ms": 5}


def test_each_client_has_its_tier() -> None:
    spec = LoadSpec(models={"a": 1}, clients={"x": 3, "y": 1}, tiers={"x": "low", "y": "low"})
    assert spec.clients == {"x": 3, "y": 1}
    assert "name the same" in problems(models=["a"], clients=["x"], tiers={"y": "low"})
    assert "name the same" in problems(models=["a"], tiers={"y": "low"})


def test_the_longest_prompt_has_its_answer_with_it() -> None:
    spec = LoadSpec.model_validate({"models": ["a"], "prompt_tokens": 100, "max_tokens": 10, "long_multiplier": 3})
    assert spec.longest_tokens == 110
    assert spec.model_copy(update={"long_share": 0.1}).longest_tokens == 310


def test_the_settings_are_listed_with_those_inside(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["settings"]) == 0
    listed = capsys.readouterr().out
    assert "models: required\n" in listed and "slo.error_rate: null\n" in listed and "users: 4\n" in listed


def test_every_setting_is_described_and_on_the_command_line() -> None:
    assert all(field.description for field in LoadSpec.model_fields.values())
    assert set(SCALARS) | {"models", "clients", "tiers", "slo"} == set(LoadSpec.model_fields)
    assert all(field.description for model in (Slo, Goodput) for field in model.model_fields.values())


def test_a_client_without_a_key_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRYDOCK_API_KEYS", '{"x": "k"}')
    assert api_keys(["x"]) == {"x": "k"} and api_keys([]) == {}
    with pytest.raises(SettingsError, match="clients: y, z: no key of that name in DRYDOCK_API_KEYS"):
        api_keys(["x", "y", "z"])
    monkeypatch.setenv("DRYDOCK_API_KEYS", "s3cret")
    with pytest.raises(SettingsError, match="not JSON such as") as caught:
        api_keys(["x"])
    assert "s3cret" not in str(caught.value)
    data = write_dataset(tmp_path / "data.jsonl")
    arguments = ["--dataset", str(data), "--out", str(tmp_path), "--models", "a", "--clients", "x=2", "y"]
    assert main(["run", "--target", "http://127.0.0.1:9", *arguments]) == 2
    assert "DRYDOCK_API_KEYS: not JSON" in capsys.readouterr().err


def test_the_spec_imports_neither_locust_nor_gevent() -> None:
    code = "import sys, stress.spec, stress.drills, stress.__main__; print({'locust', 'gevent'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_loopback() -> None:
    assert is_loopback("http://127.0.0.1:8000") and is_loopback("http://localhost/v1") and is_loopback("http://[::1]:1")
    assert not is_loopback("http://192.0.2.7:8000")  # TEST-NET-1
    with pytest.raises(ValueError, match="not a URL"):
        is_loopback("127.0.0.1:8000")


def test_a_remote_target_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "data.jsonl")
    common = ["--dataset", str(data), "--out", str(tmp_path), "--models", "a"]
    assert main(["run", "--target", "http://192.0.2.7:8000", *common]) == 2
    assert "--allow-remote" in capsys.readouterr().err
    for mistyped in ("drydock", "http://drydock:80a", "http://drydock:99999", "http://drydock:0"):
        with pytest.raises(SettingsError, match="not a URL"):
            check_target(mistyped, allow_remote=True)
    assert main(["run", "--target", "http://127.0.0.1:9", "--listen", "127.0.0.1:5557", *common]) == 2
    assert "one process makes this load by itself: raise workers" in capsys.readouterr().err
    assert main(["worker", "--target", "http://192.0.2.7:8000", "--master", "127.0.0.1:5557"]) == 2
    assert "--allow-remote" in capsys.readouterr().err
    check_target("http://drydock.no-such-namespace.svc", allow_remote=True)  # the Service may come later than the Job
    fleet = {
        "router": "http://192.0.2.7:8000",
        "replicas": [{"name": "replica-0", "url": "http://192.0.2.7:1", "pid": 4, "started_at": 0}],
    }
    (tmp_path / "fleet.json").write_text(json.dumps(fleet))
    assert main(["drill", "outage", *common]) == 2
    assert "192.0.2.7" in capsys.readouterr().err


def test_settings_file_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_dataset(tmp_path / "data.jsonl")
    settings = tmp_path / "load.yaml"
    settings.write_text("users: 3\nmodels: {kubectl: 1}\nmax_token: 5\n")
    arguments = ["run", "--target", "http://127.0.0.1:9", "--dataset", str(data), "--out", str(tmp_path)]
    assert main([*arguments, "--settings", str(settings)]) == 2
    assert "load.yaml:3: max_token: unknown setting; did you mean max_tokens?" in capsys.readouterr().err
    assert main([*arguments, "--models", "a", "--users", "0"]) == 2
    assert "users" in capsys.readouterr().err
    (tmp_path / "bad.jsonl").write_text('{"instruction": "x", "output": "y"}\n{"instruction": 1\n[]\n')
    arguments[4] = str(tmp_path / "bad.jsonl")
    assert main([*arguments, "--models", "a"]) == 2
    told = capsys.readouterr().err
    assert "bad.jsonl:2:" in told and "bad.jsonl:3:" in told
