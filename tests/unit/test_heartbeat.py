"""A hung engine is told from an idle one, from a busy one and from one that was just asked."""

from __future__ import annotations

import pytest

from serving.heartbeat import Heartbeat


class World:
    """An engine and a clock, moved by hand."""

    def __init__(self) -> None:
        self.now, self.steps = 100.0, 0
        self.heart = Heartbeat(20, progress=lambda: self.steps, clock=lambda: self.now)

    def stalled(self) -> bool:
        return self.heart.stalled

    def wait(self, seconds: float, in_flight: int, *, moves: bool = False) -> float:
        """Look each second for as long; what the last look said."""
        said = 0.0
        for _ in range(int(seconds)):
            self.now += 1
            self.steps += moves
            said = self.heart.look(in_flight)
        return said


@pytest.fixture
def world() -> World:
    return World()


def test_an_idle_engine_is_never_stalled(world: World) -> None:
    assert world.wait(600, 0) == 0
    assert not world.stalled()


def test_a_busy_engine_is_never_stalled(world: World) -> None:
    assert world.wait(600, 8, moves=True) == 0
    assert not world.stalled()


def test_an_engine_that_stops_under_requests_is_stalled_after_the_limit(world: World) -> None:
    world.wait(60, 1, moves=True)
    assert world.wait(19, 1) == 19
    assert not world.stalled()
    assert world.wait(1, 1) == 20
    assert world.stalled()
    assert world.wait(100, 3) == 120


def test_the_time_before_the_first_request_does_not_count(world: World) -> None:
    world.wait(600, 0)
    assert world.wait(20, 1) == 19, "from the look that saw it first"
    assert not world.stalled()


def test_one_step_is_enough_to_be_alive_again(world: World) -> None:
    world.wait(60, 1)
    assert world.stalled()
    assert world.wait(1, 1, moves=True) == 0
    assert not world.stalled()


def test_a_new_request_does_not_hide_that_nothing_moves(world: World) -> None:
    world.wait(15, 1)
    assert world.wait(10, 2) == 24
    assert world.stalled()


def test_clients_that_give_up_before_the_limit_leave_no_trace(world: World) -> None:
    world.wait(15, 1)
    assert world.wait(1, 0) == 0
    assert world.wait(15, 1) == 14
    assert not world.stalled()


def test_a_stalled_engine_stays_so_when_its_clients_give_up_and_until_it_moves(world: World) -> None:
    """Otherwise it would take new requests after each wave that timed out, and never be restarted."""
    world.wait(30, 1)
    assert world.wait(100, 0) == 129
    assert world.stalled()
    assert world.wait(1, 0, moves=True) == 0
    assert not world.stalled()
    assert world.wait(100, 0) == 0


def test_steps_between_two_looks_count_though_nothing_was_in_flight_at_either(world: World) -> None:
    world.wait(10, 1)
    world.steps += 5
    assert world.wait(1, 1) == 0
