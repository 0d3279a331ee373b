from __future__ import annotations

import math

import pytest

from fedmoe.simulation.clock import VirtualClock


def test_actions_come_by_moment_and_then_as_planned() -> None:
    clock, seen = VirtualClock(), list[tuple[float, str]]()
    for moment, name in ((2.0, "b"), (1.0, "a"), (2.0, "c")):
        clock.at(moment, lambda name=name: seen.append((clock.now, name)))  # type: ignore[misc]
    clock.run(5.0)
    assert seen == [(1.0, "a"), (2.0, "b"), (2.0, "c")]
    assert clock.now == 5.0


def test_what_an_action_plans_comes_too_and_what_is_later_waits() -> None:
    clock, seen = VirtualClock(), list[float]()

    def tick() -> None:
        seen.append(clock.now)
        clock.at(clock.now + 1.0, tick)

    clock.at(0.0, tick)
    clock.run(2.5)
    assert seen == [0.0, 1.0, 2.0]
    clock.run(3.0)
    assert seen == [0.0, 1.0, 2.0, 3.0]


def test_never_is_never_and_the_past_is_refused() -> None:
    clock = VirtualClock()
    clock.at(math.inf, lambda: pytest.fail("it came"))
    clock.run(10.0)
    with pytest.raises(ValueError, match="nothing can be planned for 9"):
        clock.at(9.0, lambda: None)
    with pytest.raises(ValueError, match="nan"):
        clock.at(math.nan, lambda: None)
