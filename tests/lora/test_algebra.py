from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lora_cases import adapters, alphas, bulk, dense, dense_sum, distance, laws, norm, random_adapter, seeds

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape, ShapeError
from fedmoe.lora.algebra import baked, exact_rank, product_norm, recompress, scaled, stack

MODULES = (ModuleShape("tall", 5, 40), ModuleShape("wide", 33, 6), ModuleShape("square", 16, 16))


def tail(adapter: Adapter, rank: int) -> float:
    """What Eckart-Young says must be lost at this rank, from the dense float64 decomposition."""
    values = [np.linalg.svd(product, compute_uv=False) for product in dense(adapter).values()]
    return float(np.sqrt(sum(float((found[rank:] ** 2).sum()) for found in values)))


@laws
@given(st.data(), st.lists(st.floats(-4, 4).filter(lambda w: w == 0 or abs(w) > 1e-3), min_size=1, max_size=4))
def test_a_stack_is_the_weighted_sum_of_the_dense_products(data: st.DataObject, weights: list[float]) -> None:
    first = data.draw(adapters())
    terms = [(weight, data.draw(adapters(first.layout.modules))) for weight in weights]
    stacked = stack(terms)
    assert stacked.rank == exact_rank([adapter for _, adapter in terms])
    assert stacked.scale == 1
    size = sum(abs(weight) * bulk(adapter) for weight, adapter in terms)
    assert distance(dense(stacked), dense_sum(terms)) <= 1e-5 * size


def test_a_sum_takes_no_more_rank_than_its_largest_module_can_have_and_stays_exact() -> None:
    terms = [(0.5 + number, random_adapter(Layout(MODULES, 3), number)) for number in range(8)]
    few, many = stack(terms[:5]), stack(terms)
    assert (few.rank, many.rank) == (15, 16)
    size = sum(weight * bulk(adapter) for weight, adapter in terms)
    assert distance(dense(many), dense_sum(terms)) <= 1e-6 * size
    wider = Layout(MODULES, 20)
    assert stack([(1.0, random_adapter(wider, 0))]).rank == 20


def test_adapters_of_other_modules_are_not_stacked() -> None:
    left, right = (random_adapter(Layout((ModuleShape(name, 2, 2),), 1), 0) for name in "ab")
    with pytest.raises(ShapeError, match="different modules"):
        stack([(1.0, left), (1.0, right)])
    with pytest.raises(ShapeError, match="nothing to stack"):
        stack([])


@pytest.mark.parametrize("weight", [np.inf, np.nan, 1e300])
def test_a_weight_beyond_float32_is_refused_instead_of_making_infinities(weight: float) -> None:
    adapter = random_adapter(Layout(MODULES, 2), 0)
    with pytest.raises(ValueError, match="finite float32"):
        stack([(weight, adapter)])
    with pytest.raises(ValueError, match="finite float32"):
        scaled(adapter, weight)


@laws
@given(adapters(), st.floats(-3, 3).filter(lambda factor: abs(factor) > 1e-3))
def test_scaling_scales_the_product_and_nothing_else(adapter: Adapter, factor: float) -> None:
    result = scaled(adapter, factor)
    assert (result.alpha, result.layout) == (adapter.alpha, adapter.layout)
    assert distance(dense(result), dense_sum([(factor, adapter)])) <= 1e-6 * abs(factor) * bulk(adapter)


@laws
@given(adapters())
def test_baking_keeps_the_product_and_makes_the_scale_one(adapter: Adapter) -> None:
    result = baked(adapter)
    assert result.scale == 1
    assert distance(dense(result), dense(adapter)) <= 1e-6 * bulk(adapter)


@laws
@given(adapters(), st.integers(1, 6))
def test_recompressing_loses_exactly_the_tail_of_the_dense_decomposition(adapter: Adapter, rank: int) -> None:
    result = recompress(adapter, rank)
    assert result.adapter.rank == min(rank, adapter.rank)
    size, lost = norm(dense(adapter)), tail(adapter, result.adapter.rank)
    assert abs(distance(dense(result.adapter), dense(adapter)) - lost) <= 1e-5 * lost + 1e-6 * bulk(adapter)
    assert abs(result.truncation_error * size - lost) <= 1e-5 * lost + 1e-6 * bulk(adapter)


@pytest.mark.parametrize("rank", [1, 2, 8, 20, 48])
def test_the_error_of_a_cut_stack_agrees_with_the_dense_one_to_five_digits(rank: int) -> None:
    layout = Layout(MODULES, 16)
    stacked = stack([(1 / 3, random_adapter(layout, seed, alpha=32.0)) for seed in range(3)])
    result = recompress(stacked, rank)
    expected = tail(stacked, rank)
    assert distance(dense(result.adapter), dense(stacked)) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert result.truncation_error == pytest.approx(expected / norm(dense(stacked)), rel=1e-5, abs=1e-7)


def test_directions_a_million_times_smaller_than_the_largest_are_kept() -> None:
    turns = [np.linalg.qr(np.random.default_rng(seed).standard_normal((20, 4)))[0] for seed in range(2)]
    values = np.array([1.0, 1e-2, 1e-4, 1e-6])
    adapter = Adapter.from_factors({"m": ((turns[0] * values).T, turns[1])}, 4.0)
    result = recompress(adapter, 4).adapter
    np.testing.assert_allclose(np.linalg.norm(result.module("m")[1], axis=0), values, rtol=0.02)


@pytest.mark.parametrize("repeated", [False, True])
def test_an_empty_or_repeated_direction_does_not_hide_those_whose_factors_differ_in_size(repeated: bool) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((48, 60)), rng.standard_normal((60, 48))
    levels = np.where(rng.random(48) < 0.5, 1.0, 1e8)
    b[:, 1], levels[1] = b[:, 0] if repeated else 0, levels[0]
    adapter = Adapter.from_factors({"m": (a * levels[:, None], b / levels)}, 48.0)
    assert distance(dense(recompress(adapter, 48).adapter), dense(adapter)) <= 1e-6 * norm(dense(adapter))


def test_recompressed_factors_are_orthonormal_rows_and_columns_as_long_as_the_singular_values() -> None:
    stacked = stack([(1.0, random_adapter(Layout(MODULES, 2), seed)) for seed in range(3)])
    result = recompress(stacked, 4).adapter
    assert result.scale == 1
    for module, a, b in result.factors():
        values = np.linalg.svd(dense(stacked)[module.name], compute_uv=False)[:4]
        np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-5)
        np.testing.assert_allclose(b.T @ b, np.diag(values**2), atol=1e-5 * values[0] ** 2)


def test_nearly_equal_experts_keep_their_small_differences() -> None:
    layout = Layout(MODULES, 4)
    base = random_adapter(layout, 0)
    moved = Adapter(layout, base.alpha, base.flat + np.float32(1e-4) * random_adapter(layout, 1).flat)
    difference = stack([(1.0, moved), (-1.0, base)])
    result = recompress(difference, 8)
    assert distance(dense(result.adapter), dense(difference)) <= 1e-3 * norm(dense(difference))
    assert distance(dense(recompress(difference, 8).adapter), dense(difference)) < 1e-6 * norm(dense(base))


@laws
@given(adapters(), st.floats(0.05, 1.0))
def test_an_energy_gives_the_smallest_rank_that_keeps_it_in_every_module(adapter: Adapter, energy: float) -> None:
    spectra = [np.linalg.svd(product, compute_uv=False) ** 2 for product in dense(adapter).values()]
    kept = [np.cumsum(values) / values.sum() for values in spectra if values.sum() > 0]
    assume(all(np.abs(shares - energy).min() > 1e-6 for shares in kept) or energy == 1.0)
    rank = recompress(adapter, energy=energy).adapter.rank
    needed = max((int(np.argmax(shares >= min(energy, 1 - 1e-9))) + 1 for shares in kept), default=1)
    if energy == 1.0:
        assert rank >= needed
    else:
        assert rank == needed


def test_recompressing_asks_for_one_sensible_wish() -> None:
    adapter = random_adapter(Layout(MODULES, 2), 0)
    for rank, energy in ((None, None), (1, 0.5), (0, None), (-1, None), (None, 0.0), (None, 1.5), (None, np.nan)):
        with pytest.raises(ValueError, match=r"rank|energy"):
            recompress(adapter, rank, energy)


def test_an_adapter_that_changes_nothing_stays_so() -> None:
    result = recompress(Adapter.zeros(Layout(MODULES, 3), 1.0), 2)
    assert not result.adapter.flat.any()
    assert result.truncation_error == 0
    assert recompress(Adapter.zeros(Layout(MODULES, 3), 1.0), energy=0.9).adapter.rank == 1


@laws
@given(adapters())
def test_the_product_norm_is_the_frobenius_norm_of_the_dense_products(adapter: Adapter) -> None:
    assert product_norm(adapter) == pytest.approx(norm(dense(adapter)), rel=1e-6, abs=1e-7 * bulk(adapter))


@laws
@given(seeds, alphas)
def test_turning_the_factors_changes_neither_norm_nor_cut(seed: int, alpha: float) -> None:
    adapter = random_adapter(Layout(MODULES, 4), seed, alpha=alpha)
    turn, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((4, 4)))
    turned = Adapter.from_factors({m.name: (turn.T @ a, b @ turn) for m, a, b in adapter.factors()}, alpha)
    assert product_norm(turned) == pytest.approx(product_norm(adapter), rel=1e-5)
    cut, other = recompress(adapter, 2), recompress(turned, 2)
    assert other.truncation_error == pytest.approx(cut.truncation_error, rel=1e-5)
