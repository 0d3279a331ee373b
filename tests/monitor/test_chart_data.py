"""Abilities are shares that can be compared, and missing ones stay missing."""

from __future__ import annotations

import math

import pytest
from arena_records import series_of, without

from fedmoe.monitor.arena_series import arena_series
from fedmoe.monitor.chart_data import ABILITIES, capabilities, recorded_abilities
from fedmoe.runtime.records import Record


def rewards(name: str, values: list[float], **more: float) -> list[Record]:
    return [
        {"at": 1.0, "kind": "policy", "policy": name, "iteration": i, "reward": value, **more}
        for i, value in enumerate(values)
    ]


def test_every_ability_is_a_share() -> None:
    for found in capabilities(series_of(5, 30)).values():
        assert set(found) == set(ABILITIES)
        assert all(0 <= value <= 1 for value in found.values())


def test_the_most_efficient_policy_has_one() -> None:
    thrifty = rewards("thrifty", [1.0] * 9, efficiency_token=0.4, tokens=50)
    records = thrifty + rewards("lavish", [1.0] * 9, efficiency_token=0.1, tokens=200)
    found = capabilities(arena_series(records))
    assert found["thrifty"]["efficiency"] == 1
    assert found["lavish"]["efficiency"] == pytest.approx(0.25)


def test_steady_rewards_are_more_stable_than_jumping_ones() -> None:
    found = capabilities(arena_series(rewards("steady", [0.5] * 30) + rewards("jumps", [0.0, 1.0] * 15)))
    assert found["steady"]["stability"] == 1
    assert found["jumps"]["stability"] < 0.5


def test_equal_ratings_are_an_even_chance_and_a_better_one_more() -> None:
    records: list[Record] = [
        {"at": 1.0, "kind": "rating", "iteration": 0, "policy": name, "mu": mu, "sigma": 2.0}
        for name, mu in (("low", 20.0), ("middle", 25.0), ("high", 30.0))
    ]
    found = {name: values["rating"] for name, values in capabilities(arena_series(records)).items()}
    assert found["middle"] == pytest.approx(0.5)
    assert found["high"] == pytest.approx(1 - found["low"])
    # Phi(5 / sqrt(2 (25/6)^2 + 4))
    assert found["high"] == pytest.approx(0.7889, abs=1e-3)


def test_a_policy_that_costs_its_team_is_below_a_half() -> None:
    records: list[Record] = [
        {"at": 1.0, "kind": "credit", "iteration": 0, "policy": name, "difference": value}
        for name, value in (("helps", 0.2), ("idle", 0.0), ("harms", -0.1))
    ]
    found = {name: values["cooperation"] for name, values in capabilities(arena_series(records)).items()}
    assert found == {"helps": 1.0, "idle": 0.5, "harms": 0.25}


def test_what_nobody_recorded_is_no_axis() -> None:
    values = capabilities(arena_series(without("rating")))
    assert all(math.isnan(found["rating"]) for found in values.values())
    assert recorded_abilities(values) == [name for name in ABILITIES if name != "rating"]
