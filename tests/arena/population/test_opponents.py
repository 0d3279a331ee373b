"""The pool: bounded, with the strong and the new; a policy meets those it must learn to beat."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.arena.population.opponents import BASE, OpponentPool
from fedmoe.arena.rollout.episodes import RANDOM, Player
from fedmoe.inference.engine import AdapterKey
from fedmoe.runtime.saved_state import restored, saved_state


def champions(pool: OpponentPool) -> list[str]:
    return [opponent.label for opponent in pool.opponents if opponent.kind == "champion"]


def pool_of(strengths: list[float], capacity: int) -> OpponentPool:
    pool = OpponentPool(capacity)
    for version, strength in enumerate(strengths):
        pool.add_champion(AdapterKey("p", version), strength)
    return pool


def play(pool: OpponentPool, opponent: str, wins: int, losses: int) -> None:
    for score in [1.0] * wins + [0.0] * losses:
        pool.record("a", opponent, score)


@given(st.lists(st.floats(0, 50), min_size=1, max_size=20), st.integers(1, 6))
def test_the_pool_is_bounded_and_keeps_the_newest_and_the_strongest_of_the_rest(
    strengths: list[float], capacity: int
) -> None:
    pool = OpponentPool(capacity)
    gone: list[AdapterKey] = []
    for version, strength in enumerate(strengths):
        gone += pool.add_champion(AdapterKey("p", version), strength)
    kept = champions(pool)
    assert len(kept) == min(capacity, len(strengths))
    assert sorted(kept + [str(key) for key in gone]) == sorted(f"p@{version}" for version in range(len(strengths)))
    newest = (capacity + 1) // 2
    assert {f"p@{version}" for version in range(len(strengths))[-newest:]} <= set(kept)
    if capacity >= 2:
        assert f"p@{int(np.argmax(strengths))}" in kept
    assert {BASE, RANDOM} <= {opponent.label for opponent in pool.opponents}


def test_an_expert_of_another_site_replaces_its_earlier_version() -> None:
    pool = OpponentPool()
    assert pool.add_foreign(AdapterKey("python_expert", 3)) == ()
    assert pool.add_foreign(AdapterKey("law_expert", 1)) == ()
    assert pool.add_foreign(AdapterKey("python_expert", 5)) == (AdapterKey("python_expert", 3),)
    names = [opponent.label for opponent in pool.opponents]
    assert names == [BASE, RANDOM, "law_expert@1", "python_expert@5"]


def test_opponents_sit_down_as_players_that_do_not_learn() -> None:
    pool = pool_of([20.0], 2)
    assert [opponent.player() for opponent in pool.opponents] == [
        Player("base", None),
        Player("random", None),
        Player("p@0", AdapterKey("p", 0)),
    ]


def test_who_wins_is_met_most_and_nobody_never() -> None:
    pool = pool_of([20.0, 30.0], 4)
    for opponent, wins, losses in ((BASE, 30, 10), (RANDOM, 40, 0), ("p@0", 20, 20), ("p@1", 0, 40)):
        play(pool, opponent, wins, losses)
    chances = pool.probabilities("a")
    assert sorted(chances, key=lambda name: -chances[name]) == ["p@1", "p@0", BASE, RANDOM]
    assert sum(chances.values()) == pytest.approx(1)
    assert min(chances.values()) >= 0.1 / 4


def test_the_weights_are_those_of_the_formula() -> None:
    pool = OpponentPool()
    play(pool, BASE, 3, 0)
    p_base, p_random = pool.win_rate("a", BASE), pool.win_rate("a", RANDOM)
    assert p_base == pytest.approx(0.8, abs=0.005)
    assert p_random == 0.5
    chances = pool.probabilities("a")
    assert (chances[BASE] - 0.05) / (chances[RANDOM] - 0.05) == pytest.approx((1 - p_base) ** 2 / 0.25)


def test_draws_follow_the_probabilities() -> None:
    pool, rng = pool_of([20.0, 30.0], 4), np.random.default_rng(0)
    play(pool, RANDOM, 20, 0)
    drawn = [pool.sample("a", rng).label for _ in range(4000)]
    for name, chance in pool.probabilities("a").items():
        assert drawn.count(name) / 4000 == pytest.approx(chance, abs=0.03)


def test_statistics_are_kept_per_policy_fade_and_can_be_forgotten() -> None:
    pool = OpponentPool()
    play(pool, BASE, 0, 300)
    assert pool.win_rate("b", BASE) == 0.5
    assert pool.win_rate("a", BASE) < 0.02
    play(pool, BASE, 300, 0)
    assert pool.win_rate("a", BASE) > 0.9
    pool.forget("a")
    assert pool.win_rate("a", BASE) == 0.5


def test_the_results_against_who_goes_are_forgotten() -> None:
    pool = pool_of([5.0, 20.0, 10.0, 10.0], 4)
    play(pool, "p@0", 3, 0)
    assert pool.add_champion(AdapterKey("p", 4), 10.0) == (AdapterKey("p", 0),)
    assert pool.results == {"a": {}}


def test_a_checkpoint_loses_nothing() -> None:
    pool = pool_of([20.0, 30.0, 25.0], 2)
    pool.add_foreign(AdapterKey("law_expert", 1))
    play(pool, BASE, 3, 2)
    again = restored(OpponentPool, json.loads(json.dumps(saved_state(pool))))
    assert again == pool
    for each in (pool, again):
        each.record("a", BASE, 0.5)
        each.add_champion(AdapterKey("p", 9), 28.0)
    assert again == pool
    assert again.probabilities("a") == pool.probabilities("a")


def test_unknown_opponents_double_keys_and_wrong_results_are_refused() -> None:
    pool = pool_of([20.0], 2)
    with pytest.raises(ValueError, match="not in the pool"):
        pool.record("a", "p@7", 1.0)
    with pytest.raises(ValueError, match="never reused"):
        pool.add_champion(AdapterKey("p", 0), 20.0)
    with pytest.raises(ValueError, match=r"got 1\.5"):
        pool.record("a", BASE, 1.5)
