"""A kill hits the replica that the fleet file means, or nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from stress.fleet import FleetError, Replica, check_kill, kill, read_fleet

SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def replica(pid: int, started_at: float | None = None, url: str = "http://127.0.0.1:19290") -> Replica:
    return Replica(name="replica-0", url=url, pid=pid, started_at=time.time() if started_at is None else started_at)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(SLEEP, start_new_session=True) as process:
        yield process
        process.kill()


def refusal(found: Replica) -> str:
    with pytest.raises(FleetError) as caught:
        check_kill(found)
    return str(caught.value)


def test_kills_the_whole_group() -> None:
    code = (
        "import subprocess, sys, time; c = subprocess.Popen(['sleep', '60']); print(c.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stdout=subprocess.PIPE) as process:
        assert process.stdout
        child = int(process.stdout.readline())
        before = time.time()
        at = kill([replica(process.pid)])
        assert before <= at <= time.time()
        assert process.wait(5) == -9
        for _ in range(100):
            if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
                break
            time.sleep(0.02)
        else:
            pytest.fail("the engine's own child survived")


def test_refuses_what_is_not_the_replica(sleeper: subprocess.Popen[bytes]) -> None:
    check_kill(replica(sleeper.pid))
    assert "belongs to another process" in refusal(replica(sleeper.pid, started_at=time.time() - 60))
    assert "not on this machine" in refusal(replica(sleeper.pid, url="http://192.0.2.7:8000"))
    for pid in (-1, 0, 1):
        assert "refusing" in refusal(replica(pid))
    assert sleeper.poll() is None


def test_refuses_own_group_and_strangers_groups() -> None:
    assert "own process group" in refusal(replica(os.getpid()))
    with subprocess.Popen(SLEEP) as member:  # in this test's group
        assert "own process group" in refusal(replica(member.pid))
        member.kill()
    with subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], start_new_session=True, stdout=subprocess.PIPE
    ) as leader:
        assert leader.stdout
        child = int(leader.stdout.readline())
        assert "does not lead its process group" in refusal(replica(child))
        os.killpg(leader.pid, 9)


def test_refuses_other_users(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert "belongs to user id" in refusal(replica(sleeper.pid))


def test_a_dead_replica_is_told_and_no_other_is_killed(sleeper: subprocess.Popen[bytes]) -> None:
    with subprocess.Popen(["true"], start_new_session=True) as gone:
        gone.wait()
    with pytest.raises(FleetError, match="not running"):
        kill([replica(sleeper.pid), replica(gone.pid)])
    assert sleeper.poll() is None


def test_fleet_file_errors(tmp_path: Path) -> None:
    path = tmp_path / "fleet.json"
    with pytest.raises(FleetError, match="start the fleet first"):
        read_fleet(path)
    path.write_text("{")
    with pytest.raises(FleetError, match="not a fleet file"):
        read_fleet(path)
    one = {"name": "replica-0", "url": "http://127.0.0.1:1", "pid": 5, "started_at": 1.0}
    path.write_text(json.dumps({"router": "http://127.0.0.1:2", "replicas": [one, one | {"pid": "x"}]}))
    with pytest.raises(FleetError, match=r"replicas.1.pid"):
        read_fleet(path)
    path.write_text(json.dumps({"router": "http://127.0.0.1:2", "replicas": [one, one | {"name": "b", "url": "u"}]}))
    with pytest.raises(FleetError, match="same pid"):
        read_fleet(path)
    path.write_text(json.dumps({"router": "http://127.0.0.1:2", "replicas": [one]}))
    with pytest.raises(FleetError, match="the fleet has: replica-0"):
        read_fleet(path).replica("replica-9")
