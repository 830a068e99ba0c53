"""Clients that strangers wrote, unchanged, against a real replica: its address, a key and the model's name is all they get."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from benches.serving import vllm_bench
from common.files import read_json
from tests.contract.conftest import Replica

KEY = "any"
QUESTION = "list the pods"


@pytest.mark.parametrize(("backend", "path"), [("openai-chat", "/v1/chat/completions"), ("openai", "/v1/completions")])
def test_vllms_own_benchmark_measures_a_replica(replica: Replica, tmp_path: Path, backend: str, path: str) -> None:
    command = vllm_bench(
        replica.url, "--model", "base", "--dataset-name", "random", "--random-input-len", "40", "--random-output-len", "8",
        "--num-prompts", "10", "--max-concurrency", "4", "--ignore-eos", "--save-result", "--result-dir", str(tmp_path),
        "--result-filename", "result.json", "--backend", backend, "--endpoint", path,
    )  # fmt: skip
    done = subprocess.run(command, env=os.environ | {"OPENAI_API_KEY": KEY}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = read_json(tmp_path / "result.json")
    assert (result["completed"], result["failed"]) == (10, 0), done.stdout[-2000:]
    assert result["total_output_tokens"] == 80
    assert 0 < result["median_ttft_ms"] < 30_000 and result["median_itl_ms"] > 0


def test_langchain_asks_and_streams(replica: Replica) -> None:
    import openai
    from langchain_core.messages import HumanMessage, SystemMessage
    from langchain_openai import ChatOpenAI, OpenAI

    asked = {"base_url": f"{replica.url}/v1", "api_key": KEY, "temperature": 0, "max_tokens": 24, "max_retries": 0}
    model = ChatOpenAI(model="base", **asked)
    answer = model.invoke([SystemMessage("Be short."), HumanMessage(QUESTION)])
    assert answer.text and answer.usage_metadata and answer.usage_metadata["output_tokens"] > 0
    parts = [chunk.text for chunk in model.stream([SystemMessage("Be short."), HumanMessage(QUESTION)])]
    assert len([part for part in parts if part]) > 1 and "".join(parts) == answer.text
    assert [each.text for each in model.batch([QUESTION, QUESTION])] == [model.invoke(QUESTION).text] * 2
    assert OpenAI(model="base", **asked).invoke("kubectl get")
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        ChatOpenAI(model="gpt-4", **asked).invoke(QUESTION)
