from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from lora_cases import laws, layouts, random_adapter, random_flat

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape, ShapeError, initial_adapter
from fedmoe.lora.update_rules import first_not_finite

LAYOUT = Layout((ModuleShape("b", 3, 5), ModuleShape("a", 4, 2)), 2)


@laws
@given(layouts())
def test_the_factors_of_a_layout_cover_the_flat_vector_once_in_name_order(layout: Layout) -> None:
    flat = np.arange(layout.size, dtype=np.float32)
    seen = np.concatenate([part.reshape(-1) for _, a, b in layout.factors(flat) for part in (a, b)])
    np.testing.assert_array_equal(seen, flat)
    assert [module.name for module, _, _ in layout.factors(flat)] == sorted(module.name for module in layout.modules)


def test_the_order_in_which_modules_are_named_does_not_matter() -> None:
    assert Layout(LAYOUT.modules[::-1], 2) == LAYOUT
    assert hash(Layout(LAYOUT.modules[::-1], 2)) == hash(LAYOUT)


def test_a_module_gives_the_same_views_as_the_loop_over_all() -> None:
    adapter = random_adapter(LAYOUT, 0)
    for module, a, b in adapter.factors():
        assert a.shape == (2, module.in_features)
        assert b.shape == (module.out_features, 2)
        for from_loop, by_name in zip((a, b), adapter.module(module.name), strict=True):
            assert np.shares_memory(from_loop, by_name)
            np.testing.assert_array_equal(from_loop, by_name)


def test_an_adapter_cannot_be_written_to() -> None:
    adapter = random_adapter(LAYOUT, 0)
    with pytest.raises(ValueError, match="read-only"):
        adapter.flat[0] = 1


def test_from_factors_gives_back_what_it_was_given() -> None:
    adapter = random_adapter(LAYOUT, 1, alpha=3)
    again = Adapter.from_factors({module.name: (a, b) for module, a, b in adapter.factors()}, 3)
    assert again.layout == adapter.layout
    assert isinstance(again.alpha, float)
    np.testing.assert_array_equal(again.flat, adapter.flat)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        (np.zeros((2, 3)), np.zeros((4, 1)), "one rank"),
        (np.zeros(3), np.zeros((4, 1)), "must be matrices"),
        (np.zeros((0, 3)), np.zeros((4, 0)), "at least 1"),
        (np.zeros((1, 0)), np.zeros((4, 1)), "positive feature counts"),
    ],
)
def test_factors_that_do_not_fit_are_refused(a: np.ndarray, b: np.ndarray, said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        Adapter.from_factors({"m": (a, b)}, 1.0)


def test_layouts_without_modules_or_with_a_name_twice_are_refused() -> None:
    with pytest.raises(ShapeError, match="at least one module"):
        Layout((), 1)
    with pytest.raises(ShapeError, match="more than once: \\['x'\\]"):
        Layout((ModuleShape("x", 1, 1), ModuleShape("x", 2, 2)), 1)
    with pytest.raises(ShapeError, match="at least one module"):
        Adapter.from_factors({}, 1.0)


def test_twenty_thousand_repeated_names_are_refused_without_a_search_for_each() -> None:
    modules = tuple(ModuleShape(f"m{index // 2}", 1, 1) for index in range(40_000))
    with pytest.raises(ShapeError, match="more than once"):
        Layout(modules, 1)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_a_positive_number(alpha: float) -> None:
    with pytest.raises(ShapeError, match="alpha"):
        Adapter.zeros(LAYOUT, alpha)


def test_a_vector_of_another_size_or_type_is_no_adapter() -> None:
    with pytest.raises(ShapeError, match="float32"):
        Adapter(LAYOUT, 1.0, np.zeros(LAYOUT.size + 1, np.float32))
    with pytest.raises(ShapeError, match="float64"):
        Adapter(LAYOUT, 1.0, np.zeros(LAYOUT.size))  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="shape"):
        list(LAYOUT.factors(np.zeros(LAYOUT.size - 1, np.float32)))


def test_an_expert_starts_with_random_a_and_zero_b_that_depend_on_the_seed_alone() -> None:
    start = initial_adapter(LAYOUT, 16, 7)
    np.testing.assert_array_equal(start.flat, initial_adapter(LAYOUT, 16, 7).flat)
    assert not np.array_equal(start.flat, initial_adapter(LAYOUT, 16, 8).flat)
    for module, a, b in start.factors():
        assert not b.any()
        assert np.abs(a).max() <= np.float32(module.in_features**-0.5)
    wide = initial_adapter(Layout((ModuleShape("w", 4000, 1),), 2), 1.0, 0).module("w")[0]
    assert np.abs(wide).max() > 0.99 * 4000**-0.5
    assert abs(float(wide.std()) * (3 * 4000) ** 0.5 - 1) < 0.05


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named_by_its_factor(value: float) -> None:
    for module in LAYOUT.modules:
        span = LAYOUT.spans[module.name]
        for place, factor in ((span.start, "lora_A"), (span.middle, "lora_B"), (span.stop - 1, "lora_B")):
            flat = random_flat(LAYOUT, 3)
            flat[place] = value
            assert first_not_finite(LAYOUT, flat) == f"{module.name}.{factor}"


@pytest.mark.parametrize("value", [3e38, -0.0, 1e-45, 0.0])
def test_huge_subnormal_and_negative_zero_numbers_are_finite(value: float) -> None:
    assert first_not_finite(LAYOUT, np.full(LAYOUT.size, value, np.float32)) is None
