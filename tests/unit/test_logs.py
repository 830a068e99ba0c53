"""What a command says where no terminal shows it: records that a machine reads, its end included."""

from __future__ import annotations

import argparse
import json
import logging
import sys

import pytest

from common import cli, exits
from common.logs import CHOICE, JsonLines, wants_json
from common.settings import SettingsError


def ends(error: Exception, *, machines_read: bool = True) -> int:
    def command(_: argparse.Namespace) -> int:
        raise error

    return cli.run(command, argparse.Namespace(), failures=(ConnectionError,), machines_read=machines_read)


def test_each_problem_is_a_record_of_its_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(CHOICE, "json")
    assert ends(SettingsError(["a.yaml:3: x: unknown", "d.jsonl:7: found\na break"])) == exits.INPUT
    records = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [record["message"] for record in records] == ["a.yaml:3: x: unknown", "d.jsonl:7: found\na break"]
    assert {record["level"] for record in records} == {"error"}
    assert ends(ConnectionError("no answer")) == exits.FAILED
    assert json.loads(capsys.readouterr().err)["message"] == "no answer"


def test_for_people_they_are_plain_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(CHOICE, "text")
    assert ends(SettingsError(["one", "two"])) == exits.INPUT
    assert capsys.readouterr().err == "one\ntwo\n"
    monkeypatch.setenv(CHOICE, "json")
    assert ends(SettingsError(["one"]), machines_read=False) == exits.INPUT
    assert capsys.readouterr().err == "one\n", "commands that people run answer people"


def test_an_error_of_ours_is_one_record_with_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(CHOICE, "json")
    assert ends(KeyError("lost")) == exits.FAILED
    record = json.loads(JsonLines().format(caplog.records[-1]))
    assert record["level"] == "critical" and record["message"] == "KeyError: 'lost'"
    assert "Traceback" in record["traceback"] and "test_logs.py" in record["traceback"]
    monkeypatch.setenv(CHOICE, "text")
    with pytest.raises(KeyError):
        ends(KeyError("lost"))


def test_the_form_follows_the_terminal_unless_it_is_chosen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(CHOICE, raising=False)
    assert wants_json()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert not wants_json()
    monkeypatch.setenv(CHOICE, "json")
    assert wants_json()
    monkeypatch.setenv(CHOICE, "xml")
    assert ends(KeyError("never reached")) == exits.INPUT
    assert capsys.readouterr().err == "DRYDOCK_LOG=xml: expected json or text in the environment, or nothing\n"


def test_a_warning_keeps_its_level_and_figures_their_names() -> None:
    record = logging.LogRecord("a", logging.WARNING, "f", 1, "%d rows left out", (3,), None)
    record.figures = {"rows": 3}
    said = json.loads(JsonLines().format(record))
    assert (said["level"], said["message"], said["rows"]) == ("warning", "3 rows left out", 3)
