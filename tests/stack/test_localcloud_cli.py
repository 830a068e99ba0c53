"""How a local cloud runs `pulumi` before a person: it ends in its own time, and its exit code is ours."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from localcloud import __main__ as command
from localcloud.cli import Cli, prepare
from localcloud.tools import Tools

ROOT = Path(__file__).parents[2]
TOOLS = Tools(*[Path("none")] * 9)
# Says when it listens, and what it was told; half a second after that it has written its state.
PULUMI = """\
#!/bin/sh
trap 'sleep 0.5; echo "state written" >> said; exit 7' INT
echo $$ > said.new; mv said.new said
while :; do sleep 0.1; done
"""
PERSON = """\
import sys
from pathlib import Path
from localcloud.cli import Cli
from tests.stack.test_localcloud_cli import TOOLS
folder = Path(sys.argv[1])
try:
    Cli(folder, TOOLS, {"PATH": "/usr/bin:/bin"}).show("up", cwd=folder)
except KeyboardInterrupt:
    sys.exit(42)
"""


def stand_in(folder: Path, script: str) -> None:
    program = folder / "bin" / "pulumi"
    program.parent.mkdir()
    program.write_text(script)
    program.chmod(0o755)


def test_its_exit_code_is_ours(tmp_path: Path) -> None:
    stand_in(tmp_path, "#!/bin/sh\nexit 255\n")
    before = signal.getsignal(signal.SIGTERM)
    assert Cli(tmp_path, TOOLS, {}).show("up", cwd=tmp_path) == 255
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_may_write_its_state(tmp_path: Path, number: int) -> None:
    stand_in(tmp_path, PULUMI)
    person = subprocess.Popen([sys.executable, "-c", PERSON, str(tmp_path)], cwd=ROOT, start_new_session=True)
    said = tmp_path / "said"
    while not said.exists():
        assert person.poll() is None
    if number == signal.SIGINT:
        os.killpg(person.pid, number)  # Ctrl-C: the terminal tells the whole group
    else:
        person.send_signal(number)  # `kill PID`: Python alone
    assert person.wait(10) == 42, "an interrupted command is no failed one"
    assert said.read_text().splitlines()[1] == "state written"


def test_one_that_is_not_shown_may_write_its_state_too(tmp_path: Path) -> None:
    stand_in(tmp_path, PULUMI)
    quiet = PERSON.replace(".show(", ".run(")
    person = subprocess.Popen([sys.executable, "-c", quiet, str(tmp_path)], cwd=ROOT, start_new_session=True)
    said = tmp_path / "said"
    while not said.exists():
        assert person.poll() is None
    time.sleep(0.3)  # until what started it knows that, too
    os.killpg(person.pid, signal.SIGINT)
    assert person.wait(10) == 42
    assert said.read_text().splitlines()[1:] == ["state written"], "told once: a second time ends pulumi at once"


def test_a_mistake_of_the_person_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cloud"
    for name in ("nope", "/etc", ".."):
        assert command.main(["preview", "--stack", name, "--folder", str(folder)]) == 2
        assert capsys.readouterr().err == f"Pulumi.{name}.yaml: no such file; stacks with settings: dev, local, prod\n"
    assert not folder.exists()


def test_neither_an_account_nor_a_proxy_of_the_person_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ARM_CLIENT_ID", "AZURE_TENANT_ID", "KUBECONFIG", "HTTPS_PROXY", "http_proxy", "no_proxy"):
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("LANG", "C.UTF-8")
    (tmp_path / "pulumi").touch()
    tools = dataclasses.replace(TOOLS, pulumi=tmp_path / "pulumi")
    environment = prepare(tmp_path / "cloud", tools, {}).environment
    assert "theirs" not in environment.values()
    assert environment["LANG"] == "C.UTF-8"
