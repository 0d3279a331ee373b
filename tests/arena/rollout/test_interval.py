"""Intervals over questions: how often they call equal players different, and what they do with few questions."""

from __future__ import annotations

import numpy as np
import pytest

from fedmoe.arena.rollout.interval import MeanInterval, student


def test_an_interval_is_as_wide_as_the_binomial_says() -> None:
    values = np.repeat([0.0, 1.0], 200)
    found = MeanInterval.of(values, range(400))
    half = 1.96 * 0.5 / np.sqrt(400)
    assert found.mean == 0.5
    assert found.low == pytest.approx(0.5 - half, abs=0.001)
    assert found.high == pytest.approx(0.5 + half, abs=0.001)


def test_asking_again_makes_nothing_surer() -> None:
    values = np.random.default_rng(0).random(30)
    once, often = MeanInterval.of(values, range(30)), MeanInterval.of(np.tile(values, 9), [*range(30)] * 9)
    assert often.mean == pytest.approx(once.mean)
    assert (often.low, often.high) == pytest.approx((once.low, once.high))
    assert MeanInterval.of(np.tile(values, 9), range(270)).low > once.low


def test_the_mean_weighs_episodes_alike() -> None:
    assert MeanInterval.of(np.array([1.0, 1.0, 1.0, 0.0]), ["a", "a", "a", "b"]).mean == 0.75


@pytest.mark.parametrize(
    ("value", "bounds", "low", "high"),
    [
        (0.25, (0.0, 1.0), 0.25, 0.25),
        (0.0, (-1.0, 1.0), 0.0, 0.0),
        (1.0, (0.0, 1.0), 0.025 ** (1 / 7), 1.0),
        (0.0, (0.0, 1.0), 0.0, 1 - 0.025 ** (1 / 7)),
        (1.0, (-1.0, 1.0), 1 - 2 * (1 - 0.025 ** (1 / 7)), 1.0),
    ],
)
def test_a_constant_is_sure_only_within_the_bounds(
    value: float, bounds: tuple[float, float], low: float, high: float
) -> None:
    found = MeanInterval.of(np.full(14, value), [*range(7)] * 2, bounds)
    assert found.mean == value
    assert (found.low, found.high) == pytest.approx((low, high))


def test_a_single_question_says_nothing_of_others() -> None:
    assert MeanInterval.of(np.array([0.0, 1.0, 1.0, 1.0]), "aaaa", (-1.0, 1.0)) == MeanInterval(0.75, -1.0, 1.0)


@pytest.mark.parametrize(("values", "questions"), [(0, 0), (3, 2)])
def test_no_episodes_or_other_questions_are_refused(values: int, questions: int) -> None:
    with pytest.raises(ValueError, match="a value and its question"):
        MeanInterval.of(np.zeros(values), range(questions))


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (5, 2.5706), (9, 2.2622), (49, 2.0096)]
)
def test_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student(freedom) == pytest.approx(quantile, abs=0.001)


@pytest.mark.parametrize("count", [2, 10, 20, 50, 200])
@pytest.mark.parametrize("guessing", [False, True], ids=["known or not", "guessing"])
def test_equal_players_are_called_different_in_a_fortieth_of_cases_a_side(count: int, guessing: bool) -> None:
    rng, tries = np.random.default_rng(5), 1000
    better = worse = 0
    for _ in range(tries):
        asked = rng.integers(count, size=max(100, 2 * count))
        skills = rng.beta(0.5, 0.5, (2, count)) if guessing else rng.integers(2, size=(2, count))
        own, base = (rng.random(len(asked)) < skills[:, asked]).astype(float)
        found = MeanInterval.of(own - base, asked.tolist(), (-1.0, 1.0))
        better += found.low > 0
        worse += found.high < 0
    # Three standard errors above a fortieth; the percentile bootstrap over episodes calls a fifth of 18 better.
    assert max(better, worse) / tries < 0.025 + 3 * np.sqrt(0.025 * 0.975 / tries)
