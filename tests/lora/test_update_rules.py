from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import laws
from numpy.typing import NDArray

from fedmoe.lora.adapter import ShapeError
from fedmoe.lora.update_rules import (
    _CHUNK,
    RULES,
    STALENESS,
    USUAL_LEAST,
    RuleState,
    add_scaled,
    buffered,
    clip_factor,
    hinge,
    polynomial,
)

Float64 = NDArray[np.float64]
SIZES = [1, 7, _CHUNK - 1, _CHUNK, _CHUNK + 1, 2 * _CHUNK + 3]


def vectors(count: int, size: int = 257, seed: int = 0) -> list[NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(size).astype(np.float32) for _ in range(count)]


def folded(rule: str, weights: NDArray[np.float32], deltas: list[NDArray[np.float32]], rate: float) -> RuleState:
    state = RULES[rule].init(weights)
    for delta in deltas:
        state = RULES[rule].update(state, delta, rate)
    return state


@pytest.mark.parametrize("name", sorted(STALENESS))
def test_a_fresh_update_weighs_exactly_one_and_an_older_one_never_more(name: str) -> None:
    weights = [STALENESS[name](tau) for tau in range(3000)]
    assert weights[0] == 1.0
    assert all(0 <= later <= earlier <= 1 for earlier, later in pairwise(weights))
    assert 0 <= STALENESS[name](10**9) <= weights[-1]


@laws
@given(st.integers(0, 10**6), st.floats(0.01, 3), st.floats(0.01, 50), st.integers(0, 100))
def test_staleness_follows_its_formula(tau: int, exponent: float, slope: float, free: int) -> None:
    assert polynomial(tau, exponent) == pytest.approx((1 + tau) ** -exponent)
    assert hinge(tau, slope, free) == pytest.approx(1 if tau <= free else 1 / (slope * (tau - free) + 1))
    assert STALENESS["exponential"](tau) == pytest.approx(np.exp(-0.1 * tau))
    assert STALENESS["constant"](tau) == 1


@pytest.mark.parametrize("size", SIZES)
def test_adding_a_scaled_delta_is_one_multiply_and_one_add_per_number_whatever_the_size(size: int) -> None:
    weights, delta = vectors(2, size)
    before = weights.copy(), delta.copy()
    result = add_scaled(weights, delta, 0.3)
    np.testing.assert_array_equal(result, weights + np.float32(0.3) * delta)
    assert result.dtype == np.float32
    np.testing.assert_array_equal((weights, delta), before)


def test_nothing_and_read_only_vectors_can_be_added() -> None:
    assert add_scaled(np.zeros(0, np.float32), np.zeros(0, np.float32), 1.0).shape == (0,)
    weights, delta = vectors(2, 5)
    weights.flags.writeable = delta.flags.writeable = False
    np.testing.assert_array_equal(add_scaled(weights, delta, 1.0), weights + delta)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("size", [5, 9])
def test_a_delta_of_another_size_is_refused(rule: str, size: int) -> None:
    with pytest.raises(ShapeError, match="cannot be added"):
        folded(rule, np.zeros(7, np.float32), [np.zeros(size, np.float32)], 1.0)


def test_sgd_is_the_specified_formula() -> None:
    weights, *deltas = vectors(6)
    state = folded("sgd", weights, deltas, 0.7 * polynomial(3))
    expected = weights.astype(np.float64) + 0.7 * 4**-0.5 * np.sum(deltas, axis=0, dtype=np.float64)
    np.testing.assert_allclose(state.weights, expected, rtol=1e-5, atol=1e-5)
    assert (state.count, state.moments) == (5, ())


def nesterov_reference(weights: Float64, deltas: list[Float64], rate: float) -> Float64:
    """torch.optim.SGD(lr=1 - 0.9, momentum=0.9, nesterov=True) on the gradient `-rate * delta`, written out."""
    velocity = np.zeros_like(weights)
    for delta in deltas:
        velocity = 0.9 * velocity + rate * delta
        weights = weights + (1 - 0.9) * (rate * delta + 0.9 * velocity)
    return weights


def adam_reference(weights: Float64, deltas: list[Float64], rate: float) -> Float64:
    """FedAdam (Reddi et al. 2021) with bias correction, eta = tau = 1e-3, betas 0.9 and 0.99, written out."""
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for count, delta in enumerate(deltas, start=1):
        first = 0.9 * first + 0.1 * rate * delta
        second = 0.99 * second + 0.01 * (rate * delta) ** 2
        root = np.sqrt(second / (1 - 0.99**count))
        weights = weights + 1e-3 * first / (1 - 0.9**count) / (root + 1e-3)
    return weights


@pytest.mark.parametrize(("rule", "reference"), [("nesterov", nesterov_reference), ("adam", adam_reference)])
def test_server_optimizers_follow_their_plain_float64_reference(rule: str, reference: object) -> None:
    weights, *deltas = vectors(21)
    assert callable(reference)
    expected = reference(weights.astype(np.float64), [delta.astype(np.float64) for delta in deltas], 0.6)
    state = folded(rule, weights, deltas, 0.6)
    np.testing.assert_allclose(state.weights, expected, rtol=1e-4, atol=1e-5)
    assert state.count == 20


def test_nesterov_steps_are_in_the_long_run_as_large_as_plain_ones() -> None:
    delta = np.ones(3, np.float32)
    states = [folded("nesterov", np.zeros(3, np.float32), [delta] * count, 0.5) for count in (200, 201)]
    np.testing.assert_allclose(states[1].weights - states[0].weights, 0.5, rtol=1e-4)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("size", [33, _CHUNK + 5])
def test_a_replay_of_the_same_deltas_gives_the_same_bits(rule: str, size: int) -> None:
    weights, *deltas = vectors(6, size)
    once, again = (folded(rule, weights, [delta.copy() for delta in deltas], 0.37) for _ in range(2))
    for left, right in zip((once.weights, *once.moments), (again.weights, *again.moments), strict=True):
        assert left.tobytes() == right.tobytes()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_an_update_leaves_the_state_before_it_untouched(rule: str) -> None:
    weights, delta = vectors(2)
    state = RULES[rule].update(RULES[rule].init(weights), delta, 1.0)
    kept = [part.copy() for part in (state.weights, *state.moments)]
    RULES[rule].update(state, delta, 1.0)
    np.testing.assert_array_equal([state.weights, *state.moments], kept)
    assert len(state.moments) == RULES[rule].moments
    assert RULES[rule].name == rule


def test_adam_moves_small_deltas_as_plain_steps_and_bounds_large_ones() -> None:
    small = folded("adam", np.zeros(3, np.float32), [np.full(3, 1e-6, np.float32)], 1.0)
    np.testing.assert_allclose(small.weights, 1e-6, rtol=2e-3)
    large = folded("adam", np.zeros(3, np.float32), [np.full(3, 10.0, np.float32)], 1.0)
    assert np.abs(large.weights).max() <= 1e-3


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_buffer_feeds_its_rule_with_means(name: str) -> None:
    weights, *deltas = vectors(7)
    rule = buffered(RULES[name], 3)
    state = rule.init(weights)
    for delta in deltas[:2]:
        state = rule.update(state, delta, 0.5)
    np.testing.assert_array_equal(state.weights, weights)
    for delta in deltas[2:]:
        state = rule.update(state, delta, 0.5)
    means = [np.asarray(np.mean(deltas[start : start + 3], axis=0), np.float32) for start in (0, 3)]
    np.testing.assert_allclose(state.weights, folded(name, weights, means, 0.5).weights, rtol=1e-4, atol=1e-5)
    assert state.count == 6
    assert len(state.moments) == rule.moments == RULES[name].moments + 1


def test_a_buffer_of_one_is_the_rule_itself_and_none_is_refused() -> None:
    assert buffered(RULES["sgd"], 1) is RULES["sgd"]
    with pytest.raises(ValueError, match="at least 1"):
        buffered(RULES["sgd"], 0)


# Clipping by norm: what is usual is the median of what landed before.

NORMS = st.floats(1e-3, 1e3)


@given(NORMS, st.lists(NORMS, min_size=USUAL_LEAST, max_size=40), st.floats(1, 100))
def test_a_clipped_norm_is_at_most_the_multiple_of_the_median(
    norm: float, recent: list[float], multiple: float
) -> None:
    factor = clip_factor(norm, recent, multiple)
    assert 0 < factor <= 1
    median = sorted(recent)[len(recent) // 2]
    assert factor == 1 or norm * factor <= multiple * median * (1 + 1e-9)


@given(NORMS, st.lists(NORMS, max_size=USUAL_LEAST - 1))
def test_nothing_is_unusual_before_enough_is_known(norm: float, recent: list[float]) -> None:
    assert clip_factor(norm, recent, 1.0) == 1.0


def test_usual_and_empty_updates_pass_whole() -> None:
    assert clip_factor(2.9, [1.0] * 9, 3.0) == 1.0
    assert clip_factor(0.0, [1.0] * 9, 3.0) == 1.0
    assert clip_factor(6.0, [1.0] * 9, 3.0) == 0.5
