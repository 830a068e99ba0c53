"""What load to make, and what it must stay within: validated models, importable without Locust or gevent."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from common.settings import Settings


def _list_of_names(value: Any) -> Any:
    """A list of names (or one name) means equal weights."""
    if isinstance(value, str):
        value = [value]
    if isinstance(value, list | tuple):
        if len(set(map(str, value))) != len(value):
            raise ValueError("names one twice: give weights instead, such as {kubectl: 2, triage: 1}")
        return dict.fromkeys(map(str, value), 1.0)
    return value


def _named(value: dict[str, float]) -> dict[str, float]:
    if any(not name.strip() for name in value):
        raise ValueError("has an empty name: write the adapter's alias, or the client's name")
    return value


# Types with their bounds and words, so that others (infra/settings.py) can give them another default.
Weight = Annotated[float, Field(gt=0, le=1000)]
Models = Annotated[dict[str, Weight], Field(min_length=1), BeforeValidator(_list_of_names), AfterValidator(_named)]
Users = Annotated[int, Field(ge=1, le=5000, description="closed: users at the same time")]
RampSeconds = Annotated[
    float, Field(ge=0, le=3600, description="users start evenly, or the rate rises, over this time; not measured")
]
DurationSeconds = Annotated[float, Field(gt=0, le=86_400, description="measured time after the ramp")]
Workers = Annotated[
    int,
    Field(
        ge=1,
        le=64,
        description="processes that make the load together, with a core each; users, rate, max_in_flight and "
        "max_requests are shared out among them, and without any one of them nothing is measured",
    ),
]
Clients = Models
MODELS_WORDS = (
    "adapter aliases, used in turn; `{kubectl: 3, triage: 1}` sends three to the first for each to the second; a plain "
    "list gives all the same weight"
)
CLIENTS_WORDS = (
    "whose API keys it asks with: names with weights, as for models; the weight is a share of the users, with poisson "
    "of the requests"
)


class Goodput(Settings):
    """A good request was answered and kept each objective given here; the least that there must be of them.

    As `vllm bench serve --goodput`: `ttft_ms`, `tpot_ms`, and `e2e_ms` for its `e2el`.
    """

    ttft_ms: float | None = Field(None, gt=0, description="time to first token of a streamed request, at most")
    tpot_ms: float | None = Field(
        None, gt=0, description="time per output token after the first, mean of a streamed request, at most"
    )
    e2e_ms: float | None = Field(None, gt=0, description="time to the end of the answer, at most")
    min_rps: float | None = Field(None, gt=0, description="good requests a second, at least; none: not judged")
    min_share: float | None = Field(
        None, gt=0, le=1, description="good share of all requests after the ramp, at least; none: not judged"
    )

    @property
    def objectives(self) -> dict[str, float]:
        """Those given, by name."""
        given = self.model_dump(include={"ttft_ms", "tpot_ms", "e2e_ms"}, exclude_none=True)
        return {name: float(value) for name, value in given.items()}

    @model_validator(mode="after")
    def _of_something(self) -> Goodput:
        if not self.objectives and (self.min_rps or self.min_share):
            raise ValueError("min_rps and min_share need to know what is good: give ttft_ms, tpot_ms or e2e_ms")
        return self


class Slo(Settings):
    """What the load must stay within. A bound whose figure could not be measured counts as not kept.

    429 counts as an error until `shed_rate` judges it apart. Where `error_rate` is not judged, a request that was due
    and not sent breaks what else is.
    """

    ttft_p95_ms: float | None = Field(
        None, gt=0, description="95th percentile of the time to first token, at most; none: not judged"
    )
    itl_p95_ms: float | None = Field(
        None, gt=0, description="95th percentile of the gap between two tokens, at most; none: not judged"
    )
    error_rate: float | None = Field(
        None,
        ge=0,
        le=1,
        description="failed share of all requests, ramp included, at most; 429 counts too unless shed_rate is given; "
        "none: not judged",
    )
    shed_rate: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share of all requests that was refused with 429, at most; none: 429 is an error as others",
    )
    goodput: Goodput = Field(default_factory=Goodput, description="what a good request is, and how many there must be")


class LoadSettings(Settings):
    """How requests arrive, what they ask, and what they must stay within.

    closed: each of `users` sends, waits for the whole answer, thinks, sends again. It asks less of a slow server: read
    `rps` as what these users got, not as demand. A user that was refused with 429 waits as long as Retry-After says
    (two minutes at most) before its next request, which is a new one.

    poisson: `requests_per_second` on average, at independent times, whether or not others are answered: the demand of
    many people who do not know of each other. Nobody waits for Retry-After. Times count from when a request was due,
    not from when this process came to send it. With `max_in_flight` unanswered, a request that is due is not sent, and
    counts as failed ("not sent"): the load never adapts to the server in silence. The ramp raises the rate evenly.

    The run takes `ramp_seconds + duration_seconds`, and then at most `request_timeout_seconds` for the requests that
    are still under way.
    """

    arrivals: Literal["closed", "poisson"] = Field(
        "closed", description="closed: each user waits for its answer; poisson: at a rate, answered or not"
    )
    requests_per_second: float | None = Field(
        None, gt=0, le=10_000, description="poisson: mean rate of arrivals after the ramp"
    )
    max_in_flight: int = Field(
        500, ge=1, le=5000, description="poisson: requests unanswered at once; what is due beyond it counts as failed"
    )
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
    ignore_eos: bool = Field(
        False,
        description="answers of exactly max_tokens, whatever the model would say, as `vllm bench serve --ignore-eos`: "
        "the same work each time, but users move in step; servers other than vLLM may refuse it",
    )
    stream_share: float = Field(1.0, ge=0, le=1, description="share of users that stream; the others wait for all")
    think_seconds: float = Field(0.0, ge=0, le=3600, description="closed: pause of a user between two requests")
    failure_pause_seconds: float = Field(
        0.5, ge=0, le=60, description="closed: pause after a failure, so that a closed door is not hammered"
    )
    request_timeout_seconds: float = Field(120.0, gt=0, le=3600, description="a slower request is a failure")
    seed: int = Field(
        1,
        ge=0,
        description="same seed, same prompts and arrivals: change it for a server whose prefix cache is warm",
    )
    slo: Slo = Field(default_factory=Slo, description="what the load must stay within; a breach ends it with exit 3")

    @model_validator(mode="after")
    def _arrivals_fit(self) -> LoadSettings:
        if self.arrivals == "poisson":
            if self.requests_per_second is None:
                raise ValueError("arrivals is poisson: requests_per_second is required")
            return self
        if self.requests_per_second is not None:
            raise ValueError(
                f"requests_per_second is {self.requests_per_second:g}, but arrivals is closed, whose rate follows from "
                "users: set arrivals to poisson, or leave it out"
            )
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


def enough_for(workers: int, load: LoadSettings) -> None:
    """Raise `ValueError` where one of several workers would have nothing to do, or would end the others' load."""
    if workers == 1:
        return
    if load.arrivals == "poisson":
        for name in ("max_in_flight", "max_requests"):
            if getattr(load, name) < workers:
                raise ValueError(
                    f"workers is {workers}, but {name} is {getattr(load, name)}, which they share: "
                    f"raise it to {workers} or more, or lower workers"
                )
        return
    if load.users < workers:
        raise ValueError(f"workers is {workers}, but there are only {load.users} users to share: lower workers")
    least = workers * math.ceil(load.users / workers)
    if load.max_requests < least:
        raise ValueError(
            f"max_requests is {load.max_requests}, which {workers} workers share, and each of their {load.users} users "
            f"sends at least one: raise max_requests to {least}"
        )


class LoadSpec(LoadSettings):
    """A load with the models that it asks: all that `python -m stress run` needs to know."""

    workers: Workers = 1

    models: Models = Field(description=MODELS_WORDS)
    clients: Clients | None = Field(
        None,
        description=f"{CLIENTS_WORDS}; DRYDOCK_API_KEYS has their keys as JSON, {{NAME: KEY}}; none: all with "
        "DRYDOCK_API_KEY",
    )
    tiers: dict[str, str] | None = Field(None, description="tier of each of the clients, for figures by tier")

    @model_validator(mode="after")
    def _each_client_has_a_tier(self) -> LoadSpec:
        if self.tiers is not None and set(self.tiers) != set(self.clients or ()):
            raise ValueError(f"tiers names {sorted(self.tiers)}, clients {sorted(self.clients or ())}: name the same")
        return self

    @model_validator(mode="after")
    def _each_worker_has_a_part(self) -> LoadSpec:
        enough_for(self.workers, self)
        return self

    def part(self, index: int, of: int) -> LoadSpec:
        """What worker `index` of `of` makes of this load by itself; how many users it has, Locust's master tells it.

        The first to have sent its share of `max_requests` ends the load for all: it never goes on smaller than asked.
        """

        def share(count: int) -> int:
            return count // of + (index < count % of)

        rate = self.requests_per_second
        return self.model_copy(
            update={
                "requests_per_second": rate / of if rate else None,
                "max_in_flight": share(self.max_in_flight),
                "max_requests": share(self.max_requests),
            }
        )
