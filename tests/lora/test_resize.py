from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import adapters, bulk, dense, distance, laws, layouts, random_adapter, random_flat, seeds

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape, ShapeError, initial_adapter
from fedmoe.lora.algebra import recompress
from fedmoe.lora.resize import grow_flat, grow_rank, rescale


def whole_numbers(layout: Layout, seed: int) -> Adapter:
    """Small whole numbers and a scale that is a power of two: their products carry no rounding, in any order."""
    flat = np.random.default_rng(seed).integers(-8, 9, layout.size).astype(np.float32)
    return Adapter(layout, 2.0 * layout.rank, flat)


@laws
@given(layouts(), seeds, st.integers(1, 4))
def test_growing_keeps_the_product_exactly(layout: Layout, seed: int, factor: int) -> None:
    adapter = whole_numbers(layout, seed)
    grown = grow_rank(adapter, factor * layout.rank, seed)
    assert (grown.rank, grown.scale) == (factor * layout.rank, adapter.scale)
    for name, product in dense(adapter).items():
        assert np.array_equal(dense(grown)[name], product)


@laws
@given(adapters(), st.integers(0, 5), seeds)
def test_growing_keeps_every_old_number_and_adds_zero_columns_to_b(adapter: Adapter, more: int, seed: int) -> None:
    grown = grow_rank(adapter, adapter.rank + more, seed)
    assert grown.scale == pytest.approx(adapter.scale, rel=1e-15)
    for (_, a, b), (module, new_a, new_b) in zip(adapter.factors(), grown.factors(), strict=True):
        assert np.array_equal(new_a[: adapter.rank], a)
        assert np.array_equal(new_b[:, : adapter.rank], b)
        assert not new_b[:, adapter.rank :].any()
        assert new_a[adapter.rank :].all()
        assert (np.abs(new_a[adapter.rank :]) <= 1 / np.sqrt(module.in_features)).all()


def test_new_directions_can_learn_and_depend_on_the_seed_only() -> None:
    adapter = random_adapter(Layout((ModuleShape("m", 6, 4),), 2), 0)
    one, same, other = (grow_rank(adapter, 4, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.flat, same.flat)
    assert not np.array_equal(one.flat, other.flat)
    assert np.linalg.matrix_rank(one.module("m")[0]) == 4


@laws
@given(adapters(), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_another_alpha_by_a_power_of_two_keeps_the_product_exactly(adapter: Adapter, factor: float) -> None:
    rescaled = rescale(adapter, adapter.alpha * factor)
    assert rescaled.alpha == adapter.alpha * factor
    for (_, a, b), (_, same_a, new_b) in zip(adapter.factors(), rescaled.factors(), strict=True):
        assert np.array_equal(same_a, a)
        normal = np.abs(b) > 1e-35
        assert np.array_equal((new_b * np.float32(factor))[normal], b[normal])


@laws
@given(adapters(), st.floats(0.01, 100))
def test_another_alpha_keeps_the_product(adapter: Adapter, alpha: float) -> None:
    assert distance(dense(rescale(adapter, alpha)), dense(adapter)) <= 1e-6 * bulk(adapter)


@laws
@given(layouts(), seeds, st.integers(0, 4))
def test_moments_grow_with_zeros_where_the_parameters_are_new(layout: Layout, seed: int, more: int) -> None:
    after = layout.with_rank(layout.rank + more)
    moments = random_flat(layout, seed)
    grown = grow_flat(layout, after, moments)
    kept = grow_flat(layout, after, np.ones(layout.size, np.float32)) == 1
    assert np.count_nonzero(kept) == layout.size
    assert not grown[~kept].any()
    for (_, a, b), (_, new_a, new_b) in zip(layout.factors(moments), after.factors(grown), strict=True):
        assert np.array_equal(new_a[: layout.rank], a)
        assert np.array_equal(new_b[:, : layout.rank], b)


def test_a_grown_adapter_cut_back_is_the_adapter() -> None:
    adapter = random_adapter(Layout((ModuleShape("m", 9, 7), ModuleShape("n", 5, 8)), 2), 3)
    cut = recompress(grow_rank(adapter, 5, 0), rank=2)
    assert cut.truncation_error < 1e-6
    assert distance(dense(cut.adapter), dense(adapter)) <= 1e-5 * bulk(adapter)


def test_what_cannot_be_resized_is_refused() -> None:
    layout = Layout((ModuleShape("m", 3, 2),), 2)
    adapter = initial_adapter(layout, 4.0, 0)
    with pytest.raises(ShapeError, match="use recompress"):
        grow_rank(adapter, 1, 0)
    with pytest.raises(ShapeError, match="different modules"):
        grow_flat(layout, Layout((ModuleShape("n", 3, 2),), 2), adapter.flat)
    with pytest.raises(ShapeError, match="flat vector"):
        grow_flat(layout, layout.with_rank(3), np.zeros(3, np.float32))
    for alpha in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(ShapeError, match="positive"):
            rescale(adapter, alpha)
