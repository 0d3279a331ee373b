"""Ratings (E3): they find the true order, say how sure they are, and survive a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.arena.population.rating import PRIOR_SIGMA, Ratings
from fedmoe.runtime.saved_state import restored, saved_state

#: Strengths a rating point apart as the model counts them; P(i beats j) = logistic((i - j) / (sqrt(2) * beta)).
TRUE = {"strong": 33.0, "good": 28.0, "fair": 23.0, "weak": 18.0}
SCALE = 2**0.5 * 25 / 6


def play(games: int, seed: int, drift: float = 0.0) -> Ratings:
    """Pairwise Bernoulli games between random pairs of players of known strength."""
    rng = np.random.default_rng(seed)
    ratings = Ratings(drift)
    for name in TRUE:
        ratings.ensure(name)
    for _ in range(games):
        a, b = (str(name) for name in rng.choice(list(TRUE), 2, replace=False))
        won = rng.random() < 1 / (1 + np.exp((TRUE[b] - TRUE[a]) / SCALE))
        ratings.rate([[a], [b]], [float(won), float(not won)])
    return ratings


def of(names: str) -> Ratings:
    ratings = Ratings()
    for name in names:
        ratings.ensure(name)
    return ratings


def ranking(ratings: Ratings) -> list[str]:
    return sorted(ratings.players, key=lambda name: -ratings[name].mu)


def test_after_three_hundred_games_the_order_is_the_true_order_for_nearly_every_seed() -> None:
    orders = [ranking(play(300, seed)) for seed in range(20)]
    assert sum(order == list(TRUE) for order in orders) >= 18


def test_the_interval_holds_the_true_strength_about_as_often_as_it_says() -> None:
    inside, errors = [], []
    for seed in range(25):
        ratings = play(200, seed)
        shift = np.mean([ratings[name].mu for name in TRUE]) - np.mean(list(TRUE.values()))
        inside += [ratings[name].low <= strength + shift <= ratings[name].high for name, strength in TRUE.items()]
        errors += [ratings[name].mu - strength - shift for name, strength in TRUE.items()]
    assert np.mean(inside) >= 0.9
    assert np.std(errors) < 2.2


def test_uncertainty_falls_with_games() -> None:
    few, many = play(20, seed=1), play(400, seed=1)
    for name in TRUE:
        assert many[name].sigma < few[name].sigma < PRIOR_SIGMA
        assert many[name].games > few[name].games


def test_the_strong_and_the_weak_separate_and_neighbours_do_not_at_first() -> None:
    ratings = play(200, seed=3)
    assert ratings.separated("strong", "weak")
    assert not ratings.separated("weak", "strong")
    assert not play(10, seed=3).separated("strong", "good")


def test_the_leader_leads_by_the_gap_between_the_intervals() -> None:
    ratings = play(600, seed=3)
    name, lead = ratings.leader(["weak", "strong", "fair"])
    assert name == "strong"
    assert lead == pytest.approx(ratings["strong"].low - ratings["fair"].high)
    assert (lead > 0) == ratings.separated("strong", "fair")
    assert of("ab").leader("ab")[1] < 0
    with pytest.raises(ValueError, match="lead"):
        ratings.leader(["weak"])


def test_a_tie_of_equals_moves_nobody_and_a_tie_of_unequals_brings_them_closer() -> None:
    ratings = of("ab")
    ratings.rate([["a"], ["b"]], [1, 1])
    assert ratings["a"].mu == pytest.approx(25) == ratings["b"].mu
    assert ratings["a"].sigma < PRIOR_SIGMA
    ratings.rate([["a"], ["b"]], [1, 0])
    gap = ratings["a"].mu - ratings["b"].mu
    ratings.rate([["a"], ["b"]], [0.0, 0.0])
    assert 0 < ratings["a"].mu - ratings["b"].mu < gap


def test_tied_winners_among_many_rise_above_those_they_beat() -> None:
    ratings = of("abcde")
    ratings.rate([["a"], ["b"], ["c"], ["d"], ["e"]], [1.0, 1.0, 0.5, 0.25, 0.0])
    assert ratings["a"].mu == pytest.approx(ratings["b"].mu)
    assert ratings["b"].mu > ratings["c"].mu > ratings["d"].mu > ratings["e"].mu


def test_teammates_of_equal_standing_share_what_a_team_wins() -> None:
    ratings = of("abcd")
    ratings.rate([["a", "b"], ["c", "d"]], [0.2, 0.7])
    assert ratings["a"].mu == ratings["b"].mu < 25 < ratings["c"].mu == ratings["d"].mu


def test_a_copy_starts_at_its_parents_mean_but_less_known_and_without_games() -> None:
    ratings = play(300, seed=2)
    ratings.copy_of("weak", "strong")
    assert ratings["weak"].mu == ratings["strong"].mu
    assert ratings["strong"].sigma < ratings["weak"].sigma <= PRIOR_SIGMA
    assert ratings["weak"].games == 0
    assert not ratings.separated("strong", "weak")


def test_a_removed_player_is_unknown_and_an_ensured_one_is_not_reset() -> None:
    ratings = play(20, seed=0)
    before = ratings["good"]
    ratings.ensure("good")
    assert ratings["good"] == before
    ratings.remove("good")
    assert "good" not in ratings
    with pytest.raises(ValueError, match="good"):
        ratings.remove("good")


@pytest.mark.parametrize(
    ("teams", "scores"),
    [
        ([["a"]], [1.0]),
        ([["a"], ["b"]], [1.0]),
        ([["a"], []], [1.0, 0.0]),
        ([["a"], ["a"]], [1.0, 0.0]),
        ([["a"], ["nobody"]], [1.0, 0.0]),
        ([["a"], ["b"]], [1.0, float("nan")]),
    ],
)
def test_a_game_that_makes_no_sense_is_refused_and_changes_nothing(teams: list[list[str]], scores: list[float]) -> None:
    ratings = of("ab")
    before = dict(ratings.players)
    with pytest.raises(ValueError):
        ratings.rate(teams, scores)
    assert ratings.players == before


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.permutations("abc"), st.sampled_from([0.0, 0.5, 1.0])), max_size=15))
def test_a_checkpoint_loses_nothing(games: list[tuple[list[str], float]]) -> None:
    ratings = of("abc")
    for (first, second, third), score in games:
        ratings.rate([[first], [second, third]], [score, 0.5])
    again = restored(Ratings, json.loads(json.dumps(saved_state(ratings))))
    for each in (ratings, again):
        each.rate([["a"], ["b"]], [1, 0])
    assert again == ratings


def test_importing_the_library_says_nothing_and_needs_no_torch() -> None:
    code = "import sys, fedmoe.arena.population.rating; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
