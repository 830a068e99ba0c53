"""Which drills a Job of the stack runs, and what each must stay within: validated models without heavy imports."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from common.settings import Settings
from stress.spec import LoadSpec

Scenario = Literal["long-prompts", "replica-loss", "node-drain", "outage", "tuning-eviction", "registry-unreachable"]
HURTING: tuple[Scenario, ...] = ("node-drain", "outage")
"""What clients may notice even where everything holds: fewer replicas for minutes, or none."""
NOTICED_SECONDS = 300.0
"""For every sidecar to hear of a loss that is told to it: the kubelet brings a ConfigMap in up to 90 s."""
LONGEST_LOSS_SECONDS = 1200.0
"""Of the registry, once noticed: with the wait for that it stays below the half hour after which sidecars end it."""


def _each_once(names: tuple[Scenario, ...]) -> tuple[Scenario, ...]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)}: named twice, and the second result would replace the first")
    return names


Scenarios = Annotated[tuple[Scenario, ...], Field(min_length=1), AfterValidator(_each_once)]


class Bounds(Settings):
    """What each drill must stay within. A bound whose figure could not be measured counts as not kept."""

    short_p95_ratio: float = Field(
        1.5, gt=0, description="long-prompts: TTFT p95 of normal prompts beside long ones, over that without; at most."
    )
    lost_requests: int = Field(
        0,
        ge=0,
        description="Failed requests, at most; long-prompts: of the normal ones beside long ones, replica-loss: of "
        "those whose answer had not begun, node-drain and registry-unreachable: of all.",
    )
    recovery_seconds: float = Field(
        900,
        gt=0,
        le=14_400,
        description="replica-loss: until a new replica is ready; outage: until the first token; "
        "registry-unreachable: until all replicas see it again; at most.",
    )
    moved_seconds: float = Field(
        2700,  # a GPU node takes up to 20 minutes with its driver
        gt=0,
        le=14_400,
        description="node-drain, tuning-eviction: until the new pod is ready or tunes, a new node included; at most.",
    )
    lost_steps: int = Field(0, ge=0, description="tuning-eviction: steps that the next pod makes again, at most.")

    def of(self, scenario: Scenario) -> dict[str, float]:
        """The most that each judged figure of a drill may be."""
        every: dict[Scenario, dict[str, float]] = {
            # Percentiles are of those that were answered: whoever was not would be missing from them.
            "long-prompts": {"short_p95_ratio": self.short_p95_ratio, "failed_short": self.lost_requests},
            "replica-loss": {"failed_not_begun": self.lost_requests, "recovery_seconds": self.recovery_seconds},
            "node-drain": {"failed": self.lost_requests, "recovery_seconds": self.moved_seconds},
            "outage": {"recovery_seconds": self.recovery_seconds},
            "tuning-eviction": {"recovery_seconds": self.moved_seconds, "lost_steps": self.lost_steps},
            "registry-unreachable": {
                "failed": self.lost_requests,
                "unready": 0,  # what is served must stay served
                "recovery_seconds": self.recovery_seconds,
            },
        }
        return every[scenario]

    def timeout_seconds(self, scenario: Scenario) -> float:
        """How long a drill waits: twice its bound, so that one not kept has a figure."""
        return 2 * self.of(scenario).get("recovery_seconds", self.recovery_seconds)


class DrillSpec(Settings):
    """All that `python -m stress drills` needs to know."""

    load: LoadSpec
    scenarios: Scenarios
    bounds: Bounds
    before_seconds: float = Field(gt=0)
    after_seconds: float = Field(gt=0)


def judged(
    scenario: Scenario, values: Mapping[str, Any], absent: Mapping[str, str], bounds: Bounds
) -> list[dict[str, Any]]:
    """What became of each bound: `{name, at_most, measured, held}`, as `stress.figures.bounds` says it for a load."""
    found: list[dict[str, Any]] = []
    for name, most in bounds.of(scenario).items():
        entry = {"name": name, "at_most": most}
        if (value := values.get(name)) is None:
            found.append(entry | {"reason": absent.get(name, "the drill did not get so far"), "held": False})
        else:
            found.append(entry | {"measured": value, "held": value <= most})
    return found
