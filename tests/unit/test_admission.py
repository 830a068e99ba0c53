"""Who comes in: so many of one client, none beyond the queue of its tier, and a word on when to try again."""

from __future__ import annotations

import pytest

from serving.admission import LONGEST_RETRY, Admission
from serving.errors import Refusal
from serving.keys import ANYONE, Caller
from serving.spec import Tier


class Replica:
    """An admission whose engine says what the test wants."""

    def __init__(self, max_num_seqs: int = 4) -> None:
        self.waiting, self.usage, self.now = 0.0, 0.0, 100.0
        self.door = Admission(
            max_num_seqs, waiting=lambda: self.waiting, kv_cache_usage=lambda: self.usage, clock=lambda: self.now
        )

    def refusal(self, caller: Caller) -> Refusal:
        with pytest.raises(Refusal) as caught:
            self.door.enter(caller)
        assert caught.value.status == 429
        return caught.value


def caller(client: str = "a", tier: str = "low", **limits: object) -> Caller:
    return Caller(client, tier, Tier.model_validate(limits))


def test_so_many_requests_of_one_client_at_once_whatever_others_do() -> None:
    replica = Replica()
    one, other = caller("a", concurrency=2), caller("b", concurrency=2)
    for each in (one, one, other):
        replica.door.enter(each)
    refusal = replica.refusal(one)
    assert (refusal.code, refusal.retry_after) == ("concurrency_limit_exceeded", 1)
    assert "2 requests of a at once are allowed on a replica (tier low)" in refusal.message
    replica.door.enter(other)
    replica.door.leave(one)
    replica.door.enter(one)
    replica.refusal(one)
    assert replica.door.in_flight == 4


def test_low_tiers_are_turned_away_first() -> None:
    replica = Replica()
    low, high = caller(waiting=10), caller("b", "high", waiting=100)
    replica.waiting = 9
    replica.door.enter(low)
    replica.waiting = 10
    assert "10 requests are waiting on this replica; the limit of tier low is 10" in replica.refusal(low).message
    replica.door.enter(high)
    replica.waiting = 100
    assert replica.refusal(high).code == "rate_limit_exceeded"


def test_a_full_kv_cache_turns_away_as_well() -> None:
    replica = Replica()
    low = caller(kv_cache=0.5)
    replica.usage = 0.49
    replica.door.enter(low)
    replica.usage = 0.5
    assert (
        "50% of the KV cache of this replica are in use; the limit of tier low is 50%" in replica.refusal(low).message
    )
    replica.door.enter(ANYONE)
    replica.usage = 1.0
    replica.refusal(ANYONE)


def test_a_burst_between_two_steps_of_the_engine_counts_although_its_figures_do_not_show_it() -> None:
    replica = Replica(max_num_seqs=4)
    low = caller(waiting=3)
    for _ in range(7):  # four can be computed, three wait
        replica.door.enter(low)
    assert "3 requests are waiting" in replica.refusal(low).message


def test_retry_after_follows_the_rate_at_which_requests_end() -> None:
    replica = Replica(max_num_seqs=1)
    low = caller(waiting=5)
    replica.waiting = 5
    assert replica.refusal(low).retry_after == 10, "nothing has ended yet: a guess"
    replica.waiting = 0
    for _ in range(60):  # two a second
        replica.now += 0.5
        replica.door.enter(low)
        replica.door.leave(low)
    replica.waiting = 24
    refusal = replica.refusal(low)
    assert refusal.retry_after == 10, "20 too many, two a second"
    assert (b"retry-after", b"10") in refusal.headers
    replica.waiting = 10_000
    assert replica.refusal(low).retry_after == LONGEST_RETRY
    replica.now += 1000
    replica.waiting = 5
    assert replica.refusal(low).retry_after == 10, "what ended long ago says nothing"


def test_who_left_is_forgotten() -> None:
    replica = Replica()
    for number in range(100):
        client = caller(f"client{number}")
        replica.door.enter(client)
        replica.door.leave(client)
    assert replica.door.in_flight == 0
    assert not replica.door._of_client
