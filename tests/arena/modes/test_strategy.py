"""The strategic choice: it finds what pays, follows a change, cannot be exploited, and its estimates are unbiased."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fedmoe.arena.modes.strategy import StrategyChooser, StrategyDraw, importance_weighted, team_options
from fedmoe.arena.tasks.task import Team
from fedmoe.runtime.saved_state import restored, saved_state

OPTIONS = ("plain", "debate", "review")


def play(chooser: StrategyChooser, pays: dict[str, float], rounds: int, rng: np.random.Generator) -> list[str]:
    chosen = []
    for _ in range(rounds):
        choice = chooser.choose("a+b", OPTIONS, rng)
        chooser.learn("a+b", choice, float(rng.random() < pays[choice.option]))
        chosen.append(choice.option)
    return chosen


def test_the_option_that_pays_is_chosen_most() -> None:
    shares = []
    for seed in range(10):
        chosen = play(StrategyChooser(), {"plain": 0.3, "debate": 0.7, "review": 0.3}, 400, np.random.default_rng(seed))
        shares.append(chosen[-100:].count("debate") / 100)
    assert np.mean(shares) > 0.6
    assert min(shares) > 1 / 3


def test_a_change_of_what_pays_is_followed() -> None:
    before, after = [], []
    for seed in range(10):
        rng, chooser = np.random.default_rng(seed), StrategyChooser()
        play(chooser, {"plain": 0.8, "debate": 0.2, "review": 0.2}, 500, rng)
        before.append(chooser.probabilities("a+b", OPTIONS)["plain"])
        play(chooser, {"plain": 0.2, "debate": 0.2, "review": 0.8}, 500, rng)
        after.append(chooser.probabilities("a+b", OPTIONS)["review"])
    assert np.mean(before) > 0.6
    assert np.mean(after) > 0.6


def test_two_teams_that_adapt_to_each_other_come_near_the_value_of_the_game() -> None:
    """Matching pennies: who can be foreseen loses; the value is one half."""
    rng, chooser = np.random.default_rng(0), StrategyChooser()
    wins = []
    for _ in range(4000):
        left, right = (chooser.choose(team, ("head", "tail"), rng) for team in ("left", "right"))
        same = float(left.option == right.option)
        chooser.learn("left", left, same)
        chooser.learn("right", right, 1 - same)
        wins.append(same)
    assert abs(np.mean(wins) - 0.5) < 0.05


def test_an_opponent_that_answers_the_favourite_gains_little() -> None:
    """The adversary pays nothing for the likeliest option; a fixed choice of the best average would get nothing."""
    rng, chooser = np.random.default_rng(1), StrategyChooser()
    rewards = []
    for _ in range(2000):
        probabilities = chooser.probabilities("a+b", OPTIONS)
        answered = max(probabilities, key=lambda option: probabilities[option])
        choice = chooser.choose("a+b", OPTIONS, rng)
        reward = float(choice.option != answered)
        chooser.learn("a+b", choice, reward)
        rewards.append(reward)
    assert np.mean(rewards) > 0.55


def test_the_importance_weighted_estimate_is_unbiased() -> None:
    """Over many draws the mean estimate of each option (0 when not drawn) is its reward, however skewed the draw."""
    rng, chooser = np.random.default_rng(0), StrategyChooser()
    play(chooser, {"plain": 0.9, "debate": 0.1, "review": 0.3}, 300, rng)
    assert max(chooser.probabilities("a+b", OPTIONS).values()) > 0.6
    rewards = {"plain": 0.3, "debate": 0.8, "review": 0.5}
    sums = dict.fromkeys(OPTIONS, 0.0)
    for _ in range(20_000):
        choice = chooser.choose("a+b", OPTIONS, rng)
        sums[choice.option] += importance_weighted(choice, rewards[choice.option])
    for option in OPTIONS:
        assert sums[option] / 20_000 == pytest.approx(rewards[option], abs=0.05)


def test_what_is_logged_is_what_is_drawn() -> None:
    rng, chooser = np.random.default_rng(3), StrategyChooser()
    play(chooser, {"plain": 0.9, "debate": 0.1, "review": 0.4}, 100, rng)
    probabilities = chooser.probabilities("a+b", OPTIONS)
    draws = [chooser.choose("a+b", OPTIONS, rng) for _ in range(4000)]
    for option in OPTIONS:
        share = sum(draw.option == option for draw in draws) / len(draws)
        assert share == pytest.approx(probabilities[option], abs=0.03)
        assert probabilities[option] >= 0.2 / 3
    assert all(draw.probability == probabilities[draw.option] for draw in draws)
    assert sum(probabilities.values()) == pytest.approx(1)


def test_teams_learn_apart_and_a_new_option_starts_in_the_middle() -> None:
    rng, chooser = np.random.default_rng(0), StrategyChooser()
    play(chooser, {"plain": 0.0, "debate": 1.0, "review": 0.0}, 300, rng)
    assert chooser.probabilities("c+d", OPTIONS) == pytest.approx(dict.fromkeys(OPTIONS, 1 / 3))
    grown = chooser.probabilities("a+b", (*OPTIONS, "vote"))
    assert grown["plain"] < grown["vote"] < grown["debate"]


def test_a_thousand_rewards_overflow_nothing_and_a_checkpoint_loses_nothing() -> None:
    chooser = StrategyChooser(sharing=0.0)
    play(chooser, dict.fromkeys(OPTIONS, 1.0), 3000, np.random.default_rng(0))
    again = restored(StrategyChooser, json.loads(json.dumps(saved_state(chooser))))
    for each in (chooser, again):
        play(each, {"plain": 0.5, "debate": 0.1, "review": 0.9}, 20, np.random.default_rng(7))
    assert again == chooser
    assert all(0 < p < 1 for p in again.probabilities("a+b", OPTIONS).values())


def test_senseless_rewards_choices_and_options_are_refused() -> None:
    chooser, rng = StrategyChooser(), np.random.default_rng(0)
    choice = chooser.choose("a+b", OPTIONS, rng)
    for reward in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="0, 1"):
            chooser.learn("a+b", choice, reward)
    with pytest.raises(ValueError, match="never offered"):
        chooser.learn("a+b", StrategyDraw("unheard of", 0.5), 1.0)
    with pytest.raises(ValueError, match="options"):
        chooser.choose("a+b", (), rng)


def test_every_strategy_comes_with_every_first_speaker() -> None:
    options = team_options(("plain", "debate"), ("ann", "ben", "cid"), (4, 1, 2))
    assert len(options) == 6
    assert options["debate, ben first"] == Team((1, 2, 4), "debate")
    assert options["plain, ann first"] == Team((4, 1, 2), "plain")
    assert team_options((), ("ann",), (0,)) == {"plain, ann first": Team((0,), "")}
    with pytest.raises(ValueError, match="member"):
        team_options(("plain",), ("ann", "ann"), (0, 1))
