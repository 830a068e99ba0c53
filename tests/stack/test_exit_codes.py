"""The exit codes that the tuning container's help names are those on which the Job's failure policy acts."""

from __future__ import annotations

import re

from common import exits
from training.__main__ import EXIT_CODES
from workloads.jobs import failure_policy


def documented() -> dict[int, str]:
    return {int(code): text for code, text in re.findall(r"^  (\d+) +(.*)$", EXIT_CODES, re.MULTILINE)}


def test_the_help_names_every_code_that_exists() -> None:
    assert set(documented()) == {value for name, value in vars(exits).items() if name.isupper()}


def test_a_job_is_not_tried_again_after_exactly_what_the_help_says() -> None:
    rules = [rule for rule in failure_policy().rules or [] if rule.on_exit_codes]
    (fatal,) = [rule for rule in rules if rule.action == "FailJob"]
    assert fatal.on_exit_codes.operator == "In"
    assert set(fatal.on_exit_codes.values) == {code for code, text in documented().items() if "no retry" in text}
    assert len(rules) == 1, "every other code counts against the Job's retries"
    assert "tries again" in documented()[exits.FAILED]
