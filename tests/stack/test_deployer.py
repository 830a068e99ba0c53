"""What a deployer's machine has, requirements.txt alone, is enough for what the documents have people run there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# As if nothing else were installed. packages_distributions: top-level module -> the distributions that bring it.
DEPLOYER = """
import re, runpy, sys
from importlib.metadata import packages_distributions

kept = set(re.findall(r"^([A-Za-z0-9._-]+)==", open("requirements.txt").read(), re.M))
named = lambda name: re.sub("[-_.]+", "-", name).lower()
for module, distributions in packages_distributions().items():
    if not {named(each) for each in distributions} & {named(each) for each in kept}:
        sys.modules[module] = None
if sys.argv.pop(1) == "windows":  # what it lacks
    import signal

    sys.modules["fcntl"] = None
    del signal.SIGHUP
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def run(*arguments: str | Path, system: str = "linux") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DEPLOYER, system, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["training", "check", "rehearsal/data/kubectl.jsonl"], "2,400 good rows, no problems"),
        (["training", "settings"], "learning_rate"),
        (["artifacts", "--help"], "promote"),
        (["infra.settings"], "max_model_len"),
        (["workloads.scaling_simulation", "--help"], "--load"),
    ],
)
def test_it_runs_there(command: list[str], told: str) -> None:
    done = run(*command)
    assert (done.returncode, done.stderr) == (0, "") and told in done.stdout


@pytest.mark.parametrize(
    "command", [["training", "check", "rehearsal/data/kubectl.jsonl"], ["artifacts", "list", "out"]]
)
def test_it_runs_without_what_windows_lacks(command: list[str], tmp_path: Path) -> None:
    done = run(*command, system="windows")
    assert "Traceback" not in done.stderr and done.returncode in (0, 2), done.stderr


def test_an_adapter_is_rolled_back_there(tmp_path: Path) -> None:
    done = run("artifacts", "promote", tmp_path, "kubectl", "1a2b3c4d")
    assert done.returncode == 2
    assert done.stderr.endswith(
        "adapters/kubectl: nothing is known as '1a2b3c4d'; the store has no tag in this repository\n"
    )


def test_what_needs_more_says_so() -> None:
    done = run("training", "check", "rehearsal/data/kubectl.jsonl", "--base", "rehearsal/base")
    assert done.returncode == 2
    assert "which `make setup` installs into .venv: use .venv/bin/python, or leave the base out" in done.stderr
