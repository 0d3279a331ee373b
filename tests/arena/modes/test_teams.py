"""Teams: equal in size, as equal in strength as can be, and not always the same partners."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.arena.modes.teams import EXACT_UP_TO, Split, balanced_teams, split_count, spread


def names_of(split: Split) -> list[str]:
    return sorted(name for team in split for name in team)


def partners(split: Split) -> frozenset[frozenset[str]]:
    return frozenset(frozenset(team) for team in split)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 10_000), st.data())
def test_everybody_plays_once_and_teams_are_equal_in_size(
    teams: int, size: int, seed: int, data: st.DataObject
) -> None:
    mus = data.draw(st.lists(st.floats(0, 50), min_size=teams * size, max_size=teams * size))
    strength = {f"p{index:02d}": mu for index, mu in enumerate(mus)}
    split = balanced_teams(strength, teams, np.random.default_rng(seed))
    assert names_of(split) == sorted(strength)
    assert [len(team) for team in split] == [size] * teams


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 50), min_size=6, max_size=6), st.integers(0, 100))
def test_without_slack_no_split_is_fairer(mus: list[float], seed: int) -> None:
    strength = dict(zip("abcdef", mus, strict=True))
    least = min(
        spread((half, tuple(name for name in strength if name not in half)), strength)
        for half in combinations(strength, 3)
    )
    split = balanced_teams(strength, 2, np.random.default_rng(seed), slack=0.0)
    assert spread(split, strength) == pytest.approx(least, abs=1e-6)
    loose = balanced_teams(strength, 2, np.random.default_rng(seed), slack=2.5)
    assert spread(loose, strength) <= least + 2.5 + 1e-6


def test_equal_policies_meet_every_partner() -> None:
    rng = np.random.default_rng(0)
    seen = {partners(balanced_teams(dict.fromkeys("abcd", 25.0), 2, rng, slack=0.0)) for _ in range(60)}
    assert len(seen) == 3


def test_slack_lets_nearly_equal_policies_meet_every_partner() -> None:
    rng = np.random.default_rng(0)
    strength = {"a": 25.3, "b": 25.2, "c": 25.1, "d": 25.0}
    assert len({partners(balanced_teams(strength, 2, rng, slack=0.0)) for _ in range(60)}) == 1
    assert len({partners(balanced_teams(strength, 2, rng, slack=1.0)) for _ in range(60)}) == 3


def test_a_clear_order_gives_the_strongest_the_weakest_as_partner() -> None:
    rng = np.random.default_rng(0)
    strength = {"a": 40.0, "b": 30.0, "c": 20.0, "d": 10.0}
    assert {partners(balanced_teams(strength, 2, rng)) for _ in range(20)} == {
        frozenset((frozenset("ad"), frozenset("bc")))
    }


def test_who_begins_in_which_team_is_drawn_too() -> None:
    rng = np.random.default_rng(0)
    strength = {"a": 40.0, "b": 30.0, "c": 20.0, "d": 10.0}
    assert {balanced_teams(strength, 2, rng)[0][0] for _ in range(60)} == set("abcd")


def test_many_policies_are_divided_fairly_too_and_in_more_than_one_way() -> None:
    rng = np.random.default_rng(1)
    strength = {f"p{index:02d}": float(mu) for index, mu in enumerate(rng.normal(25, 8, 24))}
    assert split_count(24, 4) > EXACT_UP_TO
    splits = [balanced_teams(strength, 4, rng, slack=0.5) for _ in range(10)]
    assert all(names_of(split) == sorted(strength) for split in splits)
    by_chance = [list(rng.permutation(sorted(strength))) for _ in range(100)]
    luck = np.median([spread(tuple(tuple(n[i::4]) for i in range(4)), strength) for n in by_chance])
    assert max(spread(split, strength) for split in splits) < luck / 5
    assert len({partners(split) for split in splits}) > 5


def test_the_same_generator_gives_the_same_teams() -> None:
    strength = dict.fromkeys("abcdefgh", 25.0)
    one, same = (balanced_teams(strength, 4, np.random.default_rng(5)) for _ in range(2))
    assert one == same


def test_what_cannot_be_divided_is_refused() -> None:
    rng = np.random.default_rng(0)
    for policies, teams in (("abc", 2), ("", 1), ("ab", 0)):
        with pytest.raises(ValueError, match="divided"):
            balanced_teams(dict.fromkeys(policies, 25.0), teams, rng)
    with pytest.raises(ValueError, match="finite"):
        balanced_teams({"a": float("nan"), "b": 1.0}, 2, rng)
