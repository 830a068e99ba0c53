"""vLLM's command line follows from the spec, and the client says what the server said."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from common.processes import free_ports
from common.settings import SettingsError
from serving.client import Engine, EngineError
from serving.engine import graph_arguments, is_ok, running, vllm_command, vllm_environment, wait_until_ok
from serving.spec import ServingSpec


def spec(**change: Any) -> ServingSpec:
    return ServingSpec.model_validate({"base_model": "/models/base", "store": "s", "adapters": ["a", "b"]} | change)


def flags(
    settings: ServingSpec, adapters: dict[str, Path] | None = None, *, middleware: bool = True
) -> dict[str, list[str]]:
    """Flag to its values; a flag given twice would be silently decided by the last, so it is an error here."""
    command = vllm_command(settings, host="0.0.0.0", port=8000, adapters=adapters, middleware=middleware)
    found: dict[str, list[str]] = {}
    for word in command[3:]:
        if word.startswith("--"):
            assert word not in found
            found[word] = []
        else:
            found[next(reversed(found))].append(word)
    return found


def test_the_command_says_what_the_spec_says() -> None:
    given = flags(
        spec(base_name="llama", dtype="bfloat16", max_model_len=8192, max_num_seqs=128, shutdown_timeout_seconds=20)
    )
    assert given["--model"] == ["/models/base"]
    assert given["--served-model-name"] == ["llama"]
    assert (given["--host"], given["--port"]) == (["0.0.0.0"], ["8000"])
    assert (given["--dtype"], given["--max-model-len"], given["--max-num-seqs"]) == (["bfloat16"], ["8192"], ["128"])
    assert given["--shutdown-timeout"] == ["20"]
    assert "--trust-remote-code" not in given
    assert "--trust-request-chat-template" not in given


def test_gpus_that_hold_a_replica_together_are_told_to_vllm_and_to_what_is_compiled() -> None:
    assert "--tensor-parallel-size" not in flags(spec())
    assert flags(spec(gpus=4))["--tensor-parallel-size"] == ["4"]
    assert graph_arguments(spec(gpus=4)) != graph_arguments(spec())


def test_a_gpu_gets_its_share_of_memory_and_a_cpu_its_cache_in_bytes_without_a_compiler() -> None:
    cuda, cpu = flags(spec(gpu_memory_utilization=0.8)), flags(spec(device="cpu", cpu_kv_cache_mib=256))
    assert cuda["--gpu-memory-utilization"] == ["0.8"]
    assert "--enforce-eager" not in cuda and "--kv-cache-memory-bytes" not in cuda
    assert cpu["--kv-cache-memory-bytes"] == [str(256 * 1024 * 1024)]
    assert cpu["--enforce-eager"] == []
    assert "--gpu-memory-utilization" not in cpu


@pytest.mark.parametrize(
    ("concurrent", "captured"),
    [
        (1, "1"),
        (3, "1 2 3"),
        (8, "1 2 4 8"),
        (20, "1 2 4 8 16 20"),
        (64, "1 2 4 8 16 24 32 40 48 56 64"),
    ],
)
def test_graphs_are_captured_for_as_many_as_decode_at_once_and_no_more(concurrent: int, captured: str) -> None:
    assert flags(spec(max_num_seqs=concurrent))["--cudagraph-capture-sizes"] == captured.split()


def test_graphs_are_left_to_vllm_where_it_captures_fewer_and_where_there_are_none() -> None:
    largest = flags(spec(max_num_seqs=512))["--cudagraph-capture-sizes"]
    assert (largest[-1], len(largest)) == ("512", 3 + 31 + 17)
    assert "--cudagraph-capture-sizes" not in flags(spec(max_num_seqs=513))
    assert "--cudagraph-capture-sizes" not in flags(spec(device="cpu"))


@pytest.mark.parametrize(("rank", "allowed"), [(1, 1), (4, 8), (16, 16), (24, 32), (512, 512)])
def test_the_rank_is_the_smallest_that_vllm_allows_and_holds_the_adapters(rank: int, allowed: int) -> None:
    assert flags(spec(max_lora_rank=rank))["--max-lora-rank"] == [str(allowed)]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_old_and_new_version_fit_side_by_side(count: int) -> None:
    given = flags(spec(adapters=[f"a{n}" for n in range(count)]))
    loras, on_cpu = int(given["--max-loras"][0]), int(given["--max-cpu-loras"][0])
    assert loras > count, "one slot more than adapters"
    assert on_cpu >= loras, "vLLM refuses fewer"


def test_adapters_given_at_the_start_are_loaded_by_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = flags(spec(adapters=[]), adapters={"candidate-a": Path("runs/a"), "candidate-b": Path("runs/b")})
    assert given["--lora-modules"] == [f"candidate-a={tmp_path}/runs/a", f"candidate-b={tmp_path}/runs/b"]
    assert int(given["--max-loras"][0]) > 2


def test_the_request_layer_stands_before_every_served_engine_and_is_importable() -> None:
    import importlib

    (path,) = flags(spec())["--middleware"]
    module, _, name = path.rpartition(".")
    assert isinstance(getattr(importlib.import_module(module), name), type)
    assert "--middleware" not in flags(spec(), middleware=False)


def test_adapters_can_be_loaded_only_where_the_request_layer_guards(tmp_path: Path) -> None:
    served, alone = (
        vllm_environment(spec(base_name="llama", max_request_kib=2), state=tmp_path),
        vllm_environment(spec()),
    )
    assert served["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert served["DRYDOCK_STATE"] == str(tmp_path)
    assert (served["DRYDOCK_BASE_NAME"], served["DRYDOCK_MAX_REQUEST_BYTES"]) == ("llama", "2048")
    assert served["VLLM_LOGGING_STREAM"] == "ext://serving.startup.STREAM"
    assert not {"VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_LOGGING_STREAM"} & alone.keys()
    for environment in (served, alone):
        assert environment["HF_HUB_OFFLINE"] == "1"
        assert environment["VLLM_NO_USAGE_STATS"] == "1"
        assert environment["VLLM_PLUGINS"] == "", "no resolver that loads adapters by request"
        assert int(environment["VLLM_MAX_N_SEQUENCES"]) <= 128
        assert "VLLM_SERVER_DEV_MODE" not in environment
        assert all(isinstance(value, str) for value in environment.values())


def test_a_cpu_replica_is_not_pinned_to_the_core_of_the_other(tmp_path: Path) -> None:
    assert vllm_environment(spec(device="cpu"))["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in vllm_environment(spec())


# Asking a server.


def test_keys_are_read_where_the_secret_is_mounted_not_where_its_links_lead_today(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "..0").mkdir()
    (tmp_path / "..0" / "keys").touch()
    (tmp_path / "keys").symlink_to("..0/keys")
    assert vllm_environment(spec(), api_keys=Path("keys"))["DRYDOCK_API_KEYS"] == f"{tmp_path}/keys"
    assert "DRYDOCK_API_KEYS" not in vllm_environment(spec())


def test_on_a_read_only_root_everything_is_written_below_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DRYDOCK_CACHE", raising=False)
    plain = vllm_environment(spec())
    assert not {"HOME", "TMPDIR", "USER"} & plain.keys(), "on a laptop they stay as they are"
    monkeypatch.setenv("DRYDOCK_CACHE", str(tmp_path / "cache"))
    added = {name: value for name, value in vllm_environment(spec()).items() if name not in plain}
    folders = {name: Path(value) for name, value in added.items() if name not in ("USER", "LOGNAME")}
    assert {"HOME", "TMPDIR", "VLLM_CACHE_ROOT", "XDG_CACHE_HOME", "HF_HOME"} <= folders.keys()
    assert all(folder.is_relative_to(tmp_path / "cache") for folder in folders.values())
    assert folders["TMPDIR"].is_dir(), "Python falls back to /tmp where TMPDIR does not exist"
    assert added["USER"] and added["LOGNAME"]
    assert "TRITON_CACHE_DIR" not in added


class Server(ThreadingHTTPServer):
    daemon_threads = True
    replies: dict[str, Any]  # path -> (status, value), or a function of the request's body
    asked: list[tuple[str, Any, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def _reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        self.server.asked.append((self.path, json.loads(body) if body else None, dict(self.headers)))
        reply = self.server.replies.get(self.path, (404, {"error": "absent"}))
        status, value = reply(json.loads(body)) if callable(reply) else reply
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = _reply

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(("127.0.0.1", 0), Handler)
    made.replies, made.asked = {}, []
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_an_answer_comes_with_the_tokens_of_prompt_and_answer(server: Server) -> None:
    choice = {"message": {"content": "hi"}, "token_ids": [7, 8]}
    server.replies["/v1/chat/completions"] = (200, {"choices": [choice], "prompt_token_ids": [1, 2, 3]})
    with Engine(url(server)) as engine:
        assert engine.answer("m", [{"role": "user", "content": "x"}], 5) == ("hi", [1, 2, 3, 7, 8], 3)
        choice["message"] = {"content": None}
        assert engine.answer("m", [{"role": "user", "content": "x"}], 5).text == ""
    _, body, headers = server.asked[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 5), "greedy"
    assert "x-drydock-sidecar" not in {name.lower() for name in headers}


def test_a_long_answer_is_waited_for_longer(server: Server) -> None:
    def slow(_: Any) -> tuple[int, Any]:
        time.sleep(0.5)
        return 200, {"choices": [{"message": {"content": "hi"}, "token_ids": [7]}], "prompt_token_ids": [1]}

    server.replies["/v1/chat/completions"] = slow
    with Engine(url(server), timeout_seconds=0.1) as engine:
        with pytest.raises(httpx.ReadTimeout):
            engine.answer("m", [{"role": "user", "content": "x"}], 1)
        assert engine.answer("m", [{"role": "user", "content": "x"}], 60).text == "hi"


def test_log_probabilities_are_of_the_given_answer_tokens_in_their_order(server: Server) -> None:
    def one(body: Any) -> tuple[int, Any]:
        return 200, {"choices": [{"logprobs": {"token_logprobs": [-body["allowed_token_ids"][0] / 10]}}]}

    server.replies["/v1/completions"] = one
    tokens = list(range(1, 25))
    with Engine(url(server)) as engine:
        assert engine.log_probabilities("m", tokens, 4) == [-token / 10 for token in tokens[4:]]
        assert engine.log_probabilities("m", tokens, 24) == []
    asked = sorted((body for _, body, _ in server.asked), key=lambda body: len(body["prompt"]))
    assert [body["prompt"] for body in asked] == [tokens[:n] for n in range(4, 24)]
    assert [body["allowed_token_ids"] for body in asked] == [[token] for token in tokens[4:]]
    assert not any("prompt_logprobs" in body for body in asked), "which kills vLLM 0.32 when others are in the batch"


def test_loading_shows_the_token_and_an_absolute_path(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.replies |= {"/v1/load_lora_adapter": (200, "ok"), "/v1/unload_lora_adapter": (200, "ok")}
    with Engine(url(server), "secret") as engine:
        engine.load("a.1", Path("cache/a"))
        engine.unload("a.1")
    assert [(path, body) for path, body, _ in server.asked] == [
        ("/v1/load_lora_adapter", {"lora_name": "a.1", "lora_path": f"{tmp_path}/cache/a"}),
        ("/v1/unload_lora_adapter", {"lora_name": "a.1"}),
    ]
    assert all(
        {k.lower(): v for k, v in headers.items()}["x-drydock-sidecar"] == "secret" for *_, headers in server.asked
    )


def test_an_error_of_the_server_is_told_in_its_words(server: Server) -> None:
    server.replies["/v1/load_lora_adapter"] = (400, {"error": {"message": "rank too large"}})
    with (
        Engine(url(server)) as engine,
        pytest.raises(EngineError, match=r"/v1/load_lora_adapter: 400: .*rank too large"),
    ):
        engine.load("a", Path("x"))


def test_models_are_the_names_the_server_knows_and_its_errors_are_httpx_ones(server: Server) -> None:
    server.replies["/v1/models"] = (200, {"data": [{"id": "base"}, {"id": "a.1"}]})
    with Engine(url(server)) as engine:
        assert engine.models() == {"base", "a.1"}
        server.replies["/v1/models"] = (500, {})
        with pytest.raises(httpx.HTTPError):
            engine.models()


def test_waiting_ends_with_the_answer_the_end_of_the_process_or_the_time(server: Server) -> None:
    server.replies["/health"] = (503, {})
    assert not is_ok(f"{url(server)}/health")
    with pytest.raises(RuntimeError, match="the process ended before"):
        wait_until_ok(f"{url(server)}/health", timeout_seconds=60, alive=lambda: False)
    with pytest.raises(TimeoutError, match="did not answer 200 within 0 s"):
        wait_until_ok(f"http://127.0.0.1:{free_ports(1)[0]}/health", timeout_seconds=0.01)
    timer = threading.Timer(0.1, lambda: server.replies.update({"/health": (200, {})}))
    timer.start()
    assert 0.05 < wait_until_ok(f"{url(server)}/health", timeout_seconds=30) < 20
    timer.join()


def test_a_vllm_of_ones_own_is_there_as_long_as_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "health").touch()
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    url = f"http://127.0.0.1:{port}"
    with running(command, os.environ, url, timeout_seconds=60, output=tmp_path / "logs" / "log") as seconds:
        assert is_ok(f"{url}/health") and 0 < seconds < 60
    assert not is_ok(f"{url}/health")
    assert "GET /health" in (tmp_path / "logs" / "log").read_text()


def test_one_that_ends_before_it_answers_is_told_with_its_last_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(1)"]
    for output in (tmp_path / "log", None):
        with (
            pytest.raises(SettingsError, match="vLLM did not start: the process ended") as told,
            running(command, os.environ, "http://127.0.0.1:9", timeout_seconds=60, output=output),
        ):
            pass
        assert ("no such model" in str(told.value)) is (output is not None)
    assert "no such model" in capfd.readouterr().out, "shown, where no file takes it"


def test_graphs_do_not_depend_on_where_the_engine_listens_or_on_its_request_layer() -> None:
    given = graph_arguments(spec(max_num_seqs=7))
    assert "--middleware" not in given and given[given.index("--max-num-seqs") + 1] == "7"
    command = vllm_command(spec(max_num_seqs=7), host="0.0.0.0", port=8000, middleware=False)
    assert command[7:] == given[4:], "all but host and port"
    assert given != graph_arguments(spec(max_num_seqs=8))


@pytest.mark.parametrize(("context", "given"), [(8192, "512"), (256, "256")])
def test_a_long_prompt_is_computed_in_parts_no_longer_than_the_context(context: int, given: str) -> None:
    spec = ServingSpec(base_model="b", store="s", max_model_len=context)
    command = vllm_command(spec, host="127.0.0.1", port=8000)
    assert command[command.index("--long-prefill-token-threshold") + 1] == given
    assert "--long-prefill-token-threshold-adaptive" in command
