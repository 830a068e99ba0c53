"""No process is left behind: not after an error, not when one ignores SIGTERM, not when the starter itself is killed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from common import processes as module
from common.files import write_json, write_jsonl
from common.memory import MemoryWatch
from common.processes import Processes, free_ports, python, wait_for


def family(path: Path, trap: str = ":;") -> list[str]:
    return ["sh", "-c", f"{trap} sleep 100 & echo $! $$ > {path}.new; mv {path}.new {path}; wait; sleep 100"]


def pids(path: Path) -> list[int]:
    until(path.is_file, f"{path} was not written")
    return [int(word) for word in path.read_text().split()]


def until(condition: Callable[[], bool], complaint: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, complaint
        time.sleep(0.01)


def running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def gone(numbers: list[int], seconds: float = 20) -> None:
    """Fails when some are left after `seconds`, and ends those, so that the test itself leaves nothing behind."""
    try:
        until(lambda: not any(map(running, numbers)), f"of {numbers} some are left", seconds)
    finally:
        for pid in filter(running, numbers):
            os.kill(pid, signal.SIGKILL)


IGNORES_TERM = "trap '' TERM;"
PASSES_TERM_ON = "trap 'kill 0' TERM;"  # as vLLM does to its engine processes


@pytest.fixture
def restored() -> Iterator[None]:
    """What signals do is afterwards as it was."""
    before = {number: signal.getsignal(number) for number in module.ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_leaving_the_block_ends_whole_groups(tmp_path: Path) -> None:
    with Processes() as processes:
        processes.start(family(tmp_path / "a"))
        processes.start(family(tmp_path / "b"))
        everyone = pids(tmp_path / "a") + pids(tmp_path / "b")
        assert all(map(running, everyone))
    gone(everyone)


def test_an_error_in_the_block_ends_them_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Processes() as processes:
        processes.start(family(tmp_path / "a"))
        everyone = pids(tmp_path / "a")
        raise KeyboardInterrupt
    gone(everyone)


def test_one_that_ignores_sigterm_is_killed_after_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.3)
    with Processes() as processes:
        processes.start(family(tmp_path / "a", IGNORES_TERM))
        processes.start(family(tmp_path / "b"))
        everyone = pids(tmp_path / "a") + pids(tmp_path / "b")
        started = time.monotonic()
    assert time.monotonic() - started < 10, "the time is for all together"
    gone(everyone)


def test_a_child_that_outlives_its_parent_in_the_group_is_ended(tmp_path: Path) -> None:
    with Processes() as processes:
        process = processes.start(
            ["sh", "-c", f"(trap '' TERM; sleep 100) & echo $! > {tmp_path}/a.new; mv {tmp_path}/a.new {tmp_path}/a"]
        )
        child = pids(tmp_path / "a")
        process.wait(20)
        assert running(child[0])
    gone(child)


def test_what_a_command_leaves_in_its_group_ends_with_it(tmp_path: Path) -> None:
    with Processes() as processes:
        assert (
            processes.run(
                ["sh", "-c", f"sleep 100 & echo $! > {tmp_path}/a.new; mv {tmp_path}/a.new {tmp_path}/a; exit 3"]
            )
            == 3
        )
        gone(pids(tmp_path / "a"))


def test_an_interrupted_command_is_ended(tmp_path: Path) -> None:
    def interrupt() -> None:
        pids(tmp_path / "a")
        os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    with pytest.raises(KeyboardInterrupt), Processes() as processes:
        thread.start()
        processes.run(family(tmp_path / "a"))
    thread.join()
    gone(pids(tmp_path / "a"))


@pytest.mark.parametrize("number", module.ENDING)
def test_a_second_signal_does_not_leave_half_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored: None, number: int
) -> None:
    monkeypatch.setattr(module, "STOP_SECONDS", 0.5)
    module.interrupt()
    with Processes() as processes:
        processes.start(family(tmp_path / "a", IGNORES_TERM))
        everyone = pids(tmp_path / "a")
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), number))
        timer.start()
    timer.join()
    gone(everyone)


def test_nothing_starts_once_the_end_has_begun() -> None:
    processes = Processes()
    processes.stop_all()
    with pytest.raises(RuntimeError, match="ending"):
        processes.start(["true"])


@pytest.mark.parametrize("how", ["start", "run"])
def test_when_the_starter_is_killed_outright_its_processes_end(tmp_path: Path, how: str) -> None:
    code = (
        "import sys, time; from common.processes import Processes\n"
        f"Processes().{how}({family(tmp_path / 'a', PASSES_TERM_ON)!r}); time.sleep(100)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code])
    everyone = pids(tmp_path / "a")
    starter.kill()
    starter.wait()
    gone(everyone)


def test_output_goes_to_the_log_and_is_added_to_it(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "a.log"
    with Processes() as processes:
        for number in (1, 2):
            environment = {"WORD": f"word{number}"}
            assert (
                processes.start(["sh", "-c", "echo $WORD; echo bad >&2"], log=log, environment=environment).wait(20)
                == 0
            )
    assert log.read_text() == "word1\nbad\nword2\nbad\n"


def test_a_command_gives_its_code_and_its_output(tmp_path: Path) -> None:
    with Processes() as processes:
        assert processes.run(["sh", "-c", "echo hi; exit 7"], stdout=tmp_path / "out") == 7
    assert (tmp_path / "out").read_text() == "hi\n"
    assert python("training", "check", Path("x")) == [sys.executable, "-m", "training", "check", "x"]


def test_waiting_ends_with_the_condition_a_failed_check_or_the_time() -> None:
    answers = iter([False, False, True])
    assert wait_for(lambda: next(answers), 20, "it", lambda: None) > 0

    def fail() -> None:
        raise RuntimeError("it died")

    with pytest.raises(RuntimeError, match="it died"):
        wait_for(lambda: False, 20, "it", fail)
    with pytest.raises(TimeoutError, match="it: not within 0 s"):
        wait_for(lambda: False, 0.01, "it", lambda: None)


def test_the_memory_watch_sees_this_process_and_its_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", "x = bytearray(150 * 2**20); print(1, flush=True); input()"],
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    try:
        assert child.stdout and child.stdout.readline()
        watch = MemoryWatch(0.05)
        watch.start()
        until(lambda: watch.peak_bytes > 170 * 2**20, f"it saw {watch.peak_bytes} bytes")
    finally:
        child.communicate(b"\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_evaluations_own_server_ends_with_the_evaluation(tmp_path: Path, number: signal.Signals) -> None:
    """`python -m serving evaluate` keeps vLLM in a session of its own, which Ctrl-C of a rehearsal does not reach."""
    run = tmp_path / "run"
    write_json(run / "spec.json", {"adapter": "a", "base_model": "b", "dataset": "d"})
    write_jsonl(run / "held_out.jsonl", [{"instruction": "a", "input": "", "output": "b"}])
    write_json(run / "adapter" / "adapter_config.json", {})
    (run / "adapter" / "adapter_model.safetensors").touch()
    write_json(tmp_path / "serving.yaml", {"base_model": "b", "store": "s", "device": "cpu"})
    command = family(tmp_path / "a", PASSES_TERM_ON)
    code = (
        "import serving.engine; from serving.__main__ import main\n"
        f"serving.engine.vllm_command = lambda *a, **k: {command!r}\n"
        f"main(['evaluate', '--spec', '{tmp_path}/serving.yaml', '--run', '{run}', '--port', '1'])"
    )
    evaluation = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    server = pids(tmp_path / "a")
    evaluation.send_signal(number)
    evaluation.wait(20)
    gone(server, seconds=3)


def test_free_ports_are_none_that_a_connection_of_someone_else_may_get() -> None:
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    assert free_ports(0) == []
    ports = free_ports(50)
    assert len(set(ports)) == 50 and all(1024 < port < first for port in ports)
    with socket.create_server(("127.0.0.1", ports[0])):
        assert ports[0] not in free_ports(2000)
