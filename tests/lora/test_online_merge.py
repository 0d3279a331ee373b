from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import (
    Dense,
    adapters,
    bulk,
    dense,
    distance,
    laws,
    moments_of,
    norm,
    random_adapter,
    random_flat,
    random_moments,
    seeds,
)
from numpy.typing import NDArray

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape, ShapeError
from fedmoe.lora.moments import InputMoments
from fedmoe.lora.online_merge import SUM_SCALE, ExpertDelta, add_into_gateway, merge_into_gateway, nearest_factors

LAYOUT = Layout((ModuleShape("q", 20, 12), ModuleShape("k", 20, 5), ModuleShape("up", 9, 31)), 3)
#: No rank is lost in it: both modules have at most four outputs or inputs.
ROOMY = Layout((ModuleShape("q", 4, 12), ModuleShape("up", 9, 4)), 4)
NAMES = ["a", "b", "c"]


def near(adapter: Adapter, seed: int, size: float = 0.1) -> Adapter:
    """The adapter after some training."""
    moved = adapter.flat + np.float32(size) * random_flat(adapter.layout, seed)
    return Adapter(adapter.layout, adapter.alpha, moved)


def departed(gateway: Adapter, size: float = 0.1) -> dict[str, ExpertDelta]:
    """Three experts: one left the gateway, the others older ones; the last is stale."""
    starts = [gateway, near(gateway, 90), near(gateway, 91)]
    return {
        name: ExpertDelta(start, near(start, 20 + place, size), weight)
        for place, (name, start, weight) in enumerate(zip(NAMES, starts, (1.0, 1.0, 0.5), strict=True))
    }


def moments_of_all(layout: Layout) -> dict[str, InputMoments]:
    return {name: random_moments(layout, 10 + place) for place, name in enumerate(NAMES)}


def dense_fold(
    gateway: Adapter, ready: Mapping[str, ExpertDelta], moments: Mapping[str, InputMoments], scale: float = 1.0
) -> tuple[Dense, Dense]:
    """The formula of the module, word by word, on dense matrices: the products before the cut, and M."""
    products, metrics = dense(gateway), {}
    deltas = {name: (dense(one.now), dense(one.start), one.weight) for name, one in ready.items()}
    for module in gateway.layout.modules:
        grams = {name: found.approximate(module.name).dense() for name, found in moments.items()}
        shares = {name: np.diagonal(gram).mean() ** -0.5 for name, gram in grams.items()}
        total = np.sum([shares[name] * gram for name, gram in grams.items()], axis=0)
        ridge, unit = 0.01 * np.diagonal(total).mean(), np.eye(module.in_features)
        metrics[module.name] = total + ridge * unit
        for name, (now, start, weight) in deltas.items():
            part = (shares[name] * grams[name] + 0.6 * ridge * unit) @ np.linalg.inv(metrics[module.name])
            products[module.name] = (
                products[module.name] + weight * scale * (now[module.name] - start[module.name]) @ part
            )
    return products, metrics


def test_a_merge_is_the_dense_formula_cut_in_the_metric_of_all_inputs() -> None:
    gateway, moments = random_adapter(LAYOUT, 1), moments_of_all(LAYOUT)
    ready = departed(gateway, 0.5)
    folded = merge_into_gateway(gateway, ready, moments)
    expected, metrics = dense_fold(gateway, ready, moments)
    roots = {name: np.linalg.cholesky(metric) for name, metric in metrics.items()}
    seen = {name: expected[name] @ roots[name] for name in expected}
    lost = norm({name: (dense(folded.adapter)[name] - expected[name]) @ roots[name] for name in expected})
    tails = [np.linalg.svd(product, compute_uv=False)[3:] for product in seen.values()]
    assert lost == pytest.approx(float(np.linalg.norm(np.concatenate(tails))), rel=1e-5)
    assert folded.truncation_error == pytest.approx(lost / norm(seen), rel=1e-5)
    assert folded.truncation_error > 0.01
    assert (folded.adapter.layout, folded.adapter.alpha) == (gateway.layout, gateway.alpha)


@laws
@given(seeds, st.permutations(NAMES), st.floats(0.1, 2.0))
def test_merges_one_by_one_come_to_the_merge_of_all(seed: int, order: list[str], scale: float) -> None:
    gateway, moments = random_adapter(ROOMY, seed), moments_of_all(ROOMY)
    ready = departed(gateway)
    expected, _ = dense_fold(gateway, ready, moments, scale)
    at_once = merge_into_gateway(gateway, ready, moments, scale=scale).adapter
    one_by_one = gateway
    for name in order:
        one_by_one = merge_into_gateway(one_by_one, {name: ready[name]}, moments, scale=scale).adapter
    assert distance(dense(at_once), expected) <= 1e-5 * bulk(at_once)
    assert distance(dense(one_by_one), expected) <= 1e-5 * bulk(one_by_one)


@laws
@given(adapters(), st.data(), seeds)
def test_an_expert_alone_comes_back_as_it_is(start: Adapter, data: st.DataObject, seed: int) -> None:
    flat = random_flat(start.layout, data.draw(seeds))
    now = Adapter(start.layout, start.alpha, flat)
    folded = merge_into_gateway(start, {"only": ExpertDelta(start, now)}, {"only": random_moments(start.layout, seed)})
    assert distance(dense(folded.adapter), dense(now)) <= 1e-4 * (bulk(now) + bulk(start))


def test_even_the_factors_of_an_expert_alone_come_back() -> None:
    gateway = random_adapter(LAYOUT, 1)
    now = near(gateway, 2)
    folded = merge_into_gateway(gateway, {"only": ExpertDelta(gateway, now)}, {"only": random_moments(LAYOUT, 3)})
    np.testing.assert_allclose(folded.adapter.flat, now.flat, atol=1e-5)


def test_the_first_merge_starts_from_a_gateway_that_does_nothing() -> None:
    flat = random_flat(LAYOUT, 1)
    for _, _, b in LAYOUT.factors(flat):
        b[:] = 0
    gateway = Adapter(LAYOUT, 16.0, flat)
    now = near(gateway, 2)
    folded = merge_into_gateway(gateway, {"only": ExpertDelta(gateway, now)}, {"only": random_moments(LAYOUT, 3)})
    np.testing.assert_allclose(folded.adapter.flat, now.flat, atol=1e-5)


def test_the_order_of_names_does_not_change_a_bit() -> None:
    gateway, moments = random_adapter(LAYOUT, 1), moments_of_all(LAYOUT)
    ready = departed(gateway)
    first = merge_into_gateway(gateway, ready, moments)
    other = merge_into_gateway(gateway, dict(reversed(ready.items())), dict(reversed(moments.items())))
    assert first.adapter.flat.tobytes() == other.adapter.flat.tobytes()
    assert first.truncation_error == other.truncation_error


def test_an_expert_that_has_not_moved_changes_nothing() -> None:
    gateway, moments = random_adapter(LAYOUT, 1), moments_of_all(LAYOUT)
    ready = departed(gateway)
    still = ExpertDelta(near(gateway, 5), near(gateway, 5))
    assert merge_into_gateway(gateway, {"a": still}, moments).adapter.flat.tobytes() == gateway.flat.tobytes()
    beside = merge_into_gateway(gateway, {**ready, "a": still}, moments).adapter
    without = merge_into_gateway(gateway, {name: ready[name] for name in "bc"}, moments).adapter
    assert beside.flat.tobytes() == without.flat.tobytes()


def test_a_delta_of_no_weight_changes_nothing() -> None:
    gateway, moments = random_adapter(LAYOUT, 1), moments_of_all(LAYOUT)
    gone = ExpertDelta(gateway, near(gateway, 2), 0.0)
    assert merge_into_gateway(gateway, {"a": gone}, moments).adapter.flat.tobytes() == gateway.flat.tobytes()


def test_a_stale_delta_counts_by_its_weight() -> None:
    gateway, moments = random_adapter(ROOMY, 1), moments_of_all(ROOMY)
    now, before = near(gateway, 2), dense(gateway)
    whole, half = (
        dense(merge_into_gateway(gateway, {"a": ExpertDelta(gateway, now, w)}, moments).adapter) for w in (1.0, 0.5)
    )
    for name, product in before.items():
        np.testing.assert_allclose(half[name] - product, (whole[name] - product) / 2, atol=1e-4)


def test_a_small_step_moves_the_factors_little() -> None:
    gateway, moments = random_adapter(LAYOUT, 1), moments_of_all(LAYOUT)
    moved = merge_into_gateway(gateway, departed(gateway, 1e-3), moments).adapter.flat - gateway.flat
    assert np.linalg.norm(moved) <= 10e-3 * np.linalg.norm(gateway.flat)


def test_inputs_of_one_expert_alone_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only one expert has inputs its delta is merged whole, and others' deltas do not disturb it."""
    monkeypatch.setattr("fedmoe.lora.regmean.RIDGE", 1e-6)
    layout = Layout((ModuleShape("q", 4, 6),), 4)
    gateway = random_adapter(layout, 1)
    halves = {"a": np.array([1, 1, 0, 0.0]), "b": np.array([0, 0, 1, 1.0])}
    moments = {name: diagonal_moments(half) for name, half in halves.items()}
    ready = {name: ExpertDelta(gateway, near(gateway, seed, 1.0)) for seed, name in enumerate("ab", 2)}
    folded = dense(merge_into_gateway(gateway, ready, moments).adapter)["q"]
    for name, columns in (("a", slice(0, 2)), ("b", slice(2, 4))):
        np.testing.assert_allclose(folded[:, columns], dense(ready[name].now)["q"][:, columns], atol=1e-3)


def diagonal_moments(diagonal: NDArray[np.float64]) -> InputMoments:
    return moments_of({"q": np.diag(diagonal)})


@laws
@given(seeds, st.integers(1, 6), st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
def test_nearest_factors_have_the_same_product(seed: int, k: int, r: int, n: int, out: int) -> None:
    rng = np.random.default_rng(seed)
    k = min(k, r)
    a, b = rng.standard_normal((k, n)).astype(np.float32), rng.standard_normal((out, k)).astype(np.float32)
    target = rng.standard_normal((r, n))
    new_a, new_b = nearest_factors(a, b, target)
    assert (new_a.shape, new_b.shape) == ((r, n), (out, r))
    np.testing.assert_allclose(new_b @ new_a, b.astype(np.float64) @ a.astype(np.float64), atol=1e-4)


def test_nearest_factors_take_the_targets_rows_where_the_product_has_them() -> None:
    rng = np.random.default_rng(0)
    target, b = rng.standard_normal((3, 8)), rng.standard_normal((5, 3))
    turn = rng.standard_normal((3, 3))
    a, _ = nearest_factors((turn @ target).astype(np.float32), (b @ np.linalg.inv(turn)).astype(np.float32), target)
    np.testing.assert_allclose(a, target, atol=1e-4)


def test_directions_that_the_product_lacks_stay_open_to_learning() -> None:
    rng = np.random.default_rng(0)
    target = rng.standard_normal((3, 8))
    a, b = nearest_factors(target[:1].astype(np.float32), np.ones((5, 1), np.float32), target)
    np.testing.assert_allclose(a, target, atol=1e-4)
    np.testing.assert_allclose(b, np.outer(np.ones(5), [1, 0, 0]), atol=1e-4)


@pytest.mark.parametrize("turned", [0.1, 1.0, 10.0])
def test_factors_keep_the_shape_of_the_target_however_far_the_product_turned(turned: float) -> None:
    rng = np.random.default_rng(0)
    target, b = rng.standard_normal((3, 40)), rng.standard_normal((5, 3))
    a = target + turned * rng.standard_normal((3, 40))
    new_a, new_b = nearest_factors(a.astype(np.float32), b.astype(np.float32), target)
    np.testing.assert_allclose(new_a @ new_a.T, target @ target.T, atol=1e-4)
    shortest = np.linalg.svd(target, compute_uv=False)[-1]
    assert np.linalg.norm(new_b) <= 1.001 * np.linalg.norm(b @ a) / shortest


def test_what_does_not_fit_is_refused() -> None:
    gateway, moments = random_adapter(LAYOUT, 1), moments_of_all(LAYOUT)
    ready = departed(gateway)
    with pytest.raises(ValueError, match="no expert is ready"):
        merge_into_gateway(gateway, {}, moments)
    with pytest.raises(ValueError, match=r"has none of \['c'\]"):
        merge_into_gateway(gateway, ready, {name: moments[name] for name in "ab"})
    with pytest.raises(ValueError, match="the weight of a must be"):
        merge_into_gateway(gateway, {"a": ExpertDelta(gateway, gateway, float("nan"))}, moments)
    with pytest.raises(ValueError, match="scale must be a positive number"):
        merge_into_gateway(gateway, ready, moments, scale=0.0)
    other = random_adapter(LAYOUT.with_rank(2), 1)
    with pytest.raises(ShapeError, match="at its own rank"):
        merge_into_gateway(gateway, {"a": ExpertDelta(other, other)}, moments)
    with pytest.raises(ShapeError, match="moments of b: module k"):
        merge_into_gateway(gateway, ready, {**moments, "b": random_moments(ROOMY, 1)})


# Without input moments.


def gateway_of(seed: int) -> Adapter:
    return Adapter(ROOMY, 6.0, random_flat(ROOMY, seed))


@laws
@given(seeds)
def test_a_merge_by_sum_is_the_dense_formula(seed: int) -> None:
    """Where the rank has room for all of it."""
    gateway = gateway_of(seed)
    ready = departed(gateway)
    expected = dense(gateway)
    for one in ready.values():
        now, start = dense(one.now), dense(one.start)
        expected = {
            name: product + SUM_SCALE * one.weight * (now[name] - start[name]) for name, product in expected.items()
        }
    assert distance(dense(add_into_gateway(gateway, ready, several=True).adapter), expected) < 1e-4


@laws
@given(seeds)
def test_an_expert_alone_comes_back_in_product_and_near_in_its_factors(seed: int) -> None:
    gateway = gateway_of(seed)
    now = near(gateway, seed + 1, 1e-3)
    folded = add_into_gateway(gateway, {"a": ExpertDelta(gateway, now)}, several=False).adapter
    assert (folded.layout, folded.alpha) == (gateway.layout, gateway.alpha)
    assert distance(dense(folded), dense(now)) < 1e-4


def test_in_a_sum_the_order_of_names_does_not_change_a_bit_and_who_has_not_moved_does_not_count() -> None:
    gateway = Adapter(LAYOUT, 6.0, random_flat(LAYOUT, 1))
    ready = departed(gateway)
    one = add_into_gateway(gateway, ready, several=True)
    still = ExpertDelta(gateway, gateway)
    other = add_into_gateway(gateway, {"z": still, **{name: ready[name] for name in reversed(NAMES)}}, several=True)
    np.testing.assert_array_equal(one.adapter.flat, other.adapter.flat)
    assert 0 < one.truncation_error < 1
    assert add_into_gateway(gateway, {"z": still}, several=True).adapter is gateway
    weightless = ExpertDelta(gateway, near(gateway, 5), 0.0)
    assert add_into_gateway(gateway, {"a": weightless}, several=True).adapter is gateway


def test_a_sum_of_adapters_of_other_modules_is_refused() -> None:
    gateway, other = gateway_of(1), Adapter(LAYOUT, 6.0, random_flat(LAYOUT, 1))
    with pytest.raises(ShapeError, match="different modules"):
        add_into_gateway(gateway, {"a": ExpertDelta(gateway, other)}, several=True)
