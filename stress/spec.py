"""What load to make, and what it must stay within: validated models, importable without Locust or gevent."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from common.settings import Settings


def _list_of_aliases(value: Any) -> Any:
    """A list of aliases (or one alias) means equal weights."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        if len(set(map(str, value))) != len(value):
            raise ValueError("names an alias twice: give weights instead, such as {kubectl: 2, triage: 1}")
        return dict.fromkeys(map(str, value), 1.0)
    return value


def _named(value: dict[str, float]) -> dict[str, float]:
    if any(not name.strip() for name in value):
        raise ValueError("has an empty name: write the alias under which clients ask for the adapter")
    return value


# Types with their bounds and words, so that others (infra/settings.py) can give them another default.
Weight = Annotated[float, Field(gt=0, le=1000)]
Models = Annotated[dict[str, Weight], Field(min_length=1), BeforeValidator(_list_of_aliases), AfterValidator(_named)]
Users = Annotated[int, Field(ge=1, le=5000, description="users at the same time")]
RampSeconds = Annotated[float, Field(ge=0, le=3600, description="users start evenly over this time; not measured")]
DurationSeconds = Annotated[float, Field(gt=0, le=86_400, description="measured time after the ramp")]
MODELS_WORDS = (
    "adapter aliases, used in turn; `{kubectl: 3, triage: 1}` sends three to the first for each to the second; a plain "
    "list gives all the same weight"
)


class Slo(Settings):
    """What the load must stay within. A bound whose figure could not be measured counts as not kept."""

    ttft_p95_ms: float | None = Field(
        None, gt=0, description="95th percentile of the time to first token, at most; none: not judged"
    )
    itl_p95_ms: float | None = Field(
        None, gt=0, description="95th percentile of the gap between two tokens, at most; none: not judged"
    )
    error_rate: float | None = Field(
        None, ge=0, le=1, description="failed share of all requests, ramp included, at most; none: not judged"
    )


class LoadSettings(Settings):
    """A closed loop: each user sends, waits for the whole answer, thinks, sends again.

    The run takes `ramp_seconds + duration_seconds`, and then at most `request_timeout_seconds` for the requests that
    are still under way. A closed loop asks less of a slow server: read `rps` as what these users got, not as demand.
    """

    users: Users = 4
    ramp_seconds: RampSeconds = 2.0
    duration_seconds: DurationSeconds = 30.0
    max_requests: int = Field(1_000_000, ge=1, description="stop earlier, after this many requests")
    prompt_tokens: int = Field(
        800, ge=1, le=1_000_000, description="aim for the prompt's length; what it came to is in the answers' usage"
    )
    chars_per_token: float | None = Field(
        None, gt=0.1, le=20, description="turns prompt_tokens into characters; measured before the run if not given"
    )
    long_share: float = Field(0.0, ge=0, le=1, description="share of requests whose prompt is long_multiplier longer")
    long_multiplier: int = Field(4, ge=2, le=64, description="how many times longer a long prompt is")
    max_tokens: int = Field(64, ge=1, le=100_000, description="limit of each answer, in tokens")
    stream_share: float = Field(1.0, ge=0, le=1, description="share of users that stream; the others wait for all")
    think_seconds: float = Field(0.0, ge=0, le=3600, description="pause of a user between two requests")
    failure_pause_seconds: float = Field(
        0.5, ge=0, le=60, description="pause after a failure, so that a closed door is not hammered"
    )
    request_timeout_seconds: float = Field(120.0, gt=0, le=3600, description="a slower request is a failure")
    seed: int = Field(
        1, ge=0, description="same seed, same prompts: change it to run again on a server whose prefix cache is warm"
    )
    slo: Slo = Field(default_factory=Slo, description="what the load must stay within; a breach ends it with exit 3")

    @model_validator(mode="after")
    def _ramp_has_users(self) -> LoadSettings:
        if self.max_requests < self.users:
            raise ValueError(
                f"max_requests is {self.max_requests}, but {self.users} users send at least one each: "
                f"raise max_requests to {self.users} or lower users"
            )
        return self

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest prompt with its answer, which must fit into the server's context."""
        return self.prompt_tokens * (self.long_multiplier if self.long_share else 1) + self.max_tokens


class LoadSpec(LoadSettings):
    """A load with the models that it asks: all that `python -m stress run` needs to know."""

    models: Models = Field(description=MODELS_WORDS)
