"""Survival: nobody goes without proof, the copy is near its parent, and descent can be traced."""

from __future__ import annotations

import numpy as np
import pytest
from builders import random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from fedmoe.arena.population.pbt import Birth, PolicyLineage, SavedLineage, choose_replacement, perturb
from fedmoe.arena.population.rating import Rating, Ratings
from fedmoe.inference.engine import AdapterKey
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape

LAYOUT = Layout((ModuleShape("down", 12, 6), ModuleShape("up", 6, 12)), rank=2)


def rated(players: dict[str, tuple[float, float, int]]) -> Ratings:
    return Ratings(0.0, {name: Rating(*rating) for name, rating in players.items()})


players = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.floats(0, 50), st.floats(0.05, 9), st.integers(0, 40)),
    min_size=1,
)


@given(players, st.integers(1, 30), st.integers(0, 10), st.none() | st.integers(0, 20))
def test_only_a_surely_worse_policy_goes_and_never_the_best(
    known: dict[str, tuple[float, float, int]], min_games: int, cooldown: int, since_last: int | None
) -> None:
    ratings = rated(known)
    decision = choose_replacement(ratings, sorted(known), min_games=min_games, cooldown=cooldown, since_last=since_last)
    if decision is None:
        return
    assert ratings[decision.worst].high < ratings[decision.best].low  # 95 %, and more
    experienced = [name for name in known if known[name][2] >= min_games]
    assert ratings[decision.best].mu == max(ratings[name].mu for name in experienced)
    assert ratings[decision.worst].mu == min(ratings[name].mu for name in experienced)
    assert {decision.worst, decision.best} <= set(experienced)
    assert since_last is None or since_last >= cooldown


def test_a_clear_case_is_decided_and_the_reason_has_the_numbers() -> None:
    ratings = rated({"a": (35.0, 1.0, 30), "b": (25.0, 1.0, 31), "c": (15.0, 1.0, 32)})
    decision = choose_replacement(ratings, ["a", "b", "c"], min_games=20, cooldown=5, since_last=None)
    assert decision is not None
    assert (decision.worst, decision.best) == ("c", "a")
    for number in ("15.00 +- 1.00", "32 games", "35.00 +- 1.00", "after 30", "2.3 sigma"):
        assert number in decision.reason


def test_rated_opponents_that_are_not_policies_take_no_part() -> None:
    ratings = rated({"a": (26.0, 1.0, 30), "b": (25.0, 1.0, 30), "random": (2.0, 0.5, 90)})
    assert choose_replacement(ratings, ["a", "b"], min_games=5, cooldown=0, since_last=None) is None


def test_nothing_happens_before_the_cooldown_is_over_nor_to_the_inexperienced() -> None:
    ratings = rated({"a": (35.0, 1.0, 30), "b": (15.0, 1.0, 19)})
    assert choose_replacement(ratings, ["a", "b"], min_games=20, cooldown=0, since_last=None) is None
    assert choose_replacement(ratings, ["a", "b"], min_games=19, cooldown=6, since_last=5) is None
    assert choose_replacement(ratings, ["a", "b"], min_games=19, cooldown=6, since_last=6) is not None


def test_a_fresh_copy_is_safe_until_it_has_played() -> None:
    ratings = rated({"a": (35.0, 1.0, 30), "b": (25.0, 1.0, 30), "c": (15.0, 1.0, 30)})
    ratings.copy_of("c", "a")
    decision = choose_replacement(ratings, ["a", "b", "c"], min_games=20, cooldown=0, since_last=9)
    assert decision is not None
    assert decision.worst == "b"


def test_equal_players_are_rarely_culled() -> None:
    """Looked at after every round, most populations of equals keep everybody for 40 rounds of games."""
    culled = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ratings = Ratings()
        for name in "abcd":
            ratings.ensure(name)
        for _ in range(40):
            first, second, third, fourth = (str(name) for name in rng.permutation(list("abcd")))
            for pair in ((first, second), (third, fourth)):
                won = float(rng.integers(2))
                ratings.rate([[pair[0]], [pair[1]]], [won, 1 - won])
            if choose_replacement(ratings, "abcd", min_games=10, cooldown=0, since_last=None):
                culled += 1
                break
    assert culled <= 2


def test_of_players_of_known_strength_a_weak_one_goes_after_some_dozens_of_games() -> None:
    strength = {"a": 33.0, "b": 28.0, "c": 23.0, "d": 18.0}
    gone, games = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        ratings = Ratings()
        for name in strength:
            ratings.ensure(name)
        for game in range(1, 301):
            one, other = (str(name) for name in rng.choice(list(strength), 2, replace=False))
            won = float(rng.random() < 1 / (1 + np.exp((strength[other] - strength[one]) / (2**0.5 * 25 / 6))))
            ratings.rate([[one], [other]], [won, 1 - won])
            if decision := choose_replacement(ratings, list(strength), min_games=5, cooldown=0, since_last=None):
                assert strength[decision.worst] < strength[decision.best]
                gone.append(decision.worst)
                games.append(game)
                break
    assert gone.count("d") >= 16
    assert np.median(games) < 80


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 2))
def test_the_noise_of_each_factor_is_as_long_as_asked(seed: int, relative: float) -> None:
    parent = random_adapter(LAYOUT, seed, 1.0, 4.0)
    child = perturb(parent, relative, np.random.default_rng(seed))
    for (_, a, b), (_, child_a, child_b) in zip(parent.factors(), child.factors(), strict=True):
        for before, after in ((a, child_a), (b, child_b)):
            assert np.linalg.norm(after - before) == pytest.approx(relative * np.linalg.norm(before), abs=1e-5)


def test_a_policy_that_has_learned_nothing_stays_the_base_model() -> None:
    flat = random_adapter(LAYOUT, 0, 1.0, 4.0).flat.copy()
    for _, _, b in LAYOUT.factors(flat):
        b[...] = 0
    parent = Adapter(LAYOUT, 4.0, flat)
    child = perturb(parent, 0.3, np.random.default_rng(1))
    for (_, a, _), (_, child_a, child_b) in zip(parent.factors(), child.factors(), strict=True):
        assert not child_b.any()
        assert np.abs(child_a - a).max() > 0


def test_noise_depends_on_the_generator_only_and_leaves_the_parent_alone() -> None:
    parent = random_adapter(LAYOUT, 0, 1.0, 4.0)
    before = parent.flat.copy()
    one, same, other = (perturb(parent, 0.1, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one.flat, same.flat)
    assert not np.array_equal(one.flat, other.flat)
    assert np.array_equal(parent.flat, before)
    with pytest.raises(ValueError, match="-1"):
        perturb(parent, -1.0, np.random.default_rng(0))


def birth(child: str, parent: str, iteration: int) -> Birth:
    def key(text: str) -> AdapterKey:
        name, version = text.split("@")
        return AdapterKey(name, int(version))

    return Birth(key(child), key(parent), iteration, "surely worse", 0.1)


def test_a_lineage_survives_a_checkpoint_and_keeps_the_rules() -> None:
    saved: TypeAdapter[PolicyLineage] = TypeAdapter(SavedLineage)
    lineage = PolicyLineage([birth("c@10", "a@9", 10), birth("a@20", "b@19", 20)])
    again = saved.validate_json(saved.dump_json(lineage))
    assert again == lineage
    assert lineage.state()[0] == {
        "child": ["c", 10],
        "parent": ["a", 9],
        "iteration": 10,
        "reason": "surely worse",
        "relative_noise": 0.1,
    }
    assert again.since_last(26) == 6
    assert PolicyLineage().since_last(26) is None
    with pytest.raises(ValueError, match="never used again"):
        again.add(birth("c@10", "b@40", 40))
    with pytest.raises(ValueError, match="order"):
        again.add(birth("c@11", "b@9", 11))
