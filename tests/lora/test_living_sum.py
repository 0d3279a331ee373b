from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from lora_cases import dense, distance, laws, random_flat, seeds
from test_living import LAYOUT, NAMES, ROOMY, departed, near

from fedmoe.lora.adapter import Adapter, ShapeError
from fedmoe.lora.online_merge import SUM_SCALE, Departed, fold_sum


def gateway_of(seed: int) -> Adapter:
    return Adapter(ROOMY, 6.0, random_flat(ROOMY, seed))


@laws
@given(seeds)
def test_a_fold_by_sum_is_the_dense_formula(seed: int) -> None:
    """Where the rank has room for all of it."""
    gateway = gateway_of(seed)
    ready = departed(gateway)
    expected = dense(gateway)
    for one in ready.values():
        now, start = dense(one.now), dense(one.start)
        expected = {
            name: product + SUM_SCALE * one.weight * (now[name] - start[name]) for name, product in expected.items()
        }
    assert distance(dense(fold_sum(gateway, ready, several=True).adapter), expected) < 1e-4


@laws
@given(seeds)
def test_an_expert_alone_comes_back_in_product_and_near_in_its_factors(seed: int) -> None:
    gateway = gateway_of(seed)
    now = near(gateway, seed + 1, 1e-3)
    folded = fold_sum(gateway, {"a": Departed(gateway, now)}, several=False).adapter
    assert (folded.layout, folded.alpha) == (gateway.layout, gateway.alpha)
    assert distance(dense(folded), dense(now)) < 1e-4


def test_the_order_of_names_does_not_change_a_bit_and_who_has_not_moved_does_not_count() -> None:
    gateway = Adapter(LAYOUT, 6.0, random_flat(LAYOUT, 1))
    ready = departed(gateway)
    one = fold_sum(gateway, ready, several=True)
    still = Departed(gateway, gateway)
    other = fold_sum(gateway, {"z": still, **{name: ready[name] for name in reversed(NAMES)}}, several=True)
    np.testing.assert_array_equal(one.adapter.flat, other.adapter.flat)
    assert 0 < one.truncation_error < 1
    assert fold_sum(gateway, {"z": still}, several=True).adapter is gateway
    weightless = Departed(gateway, near(gateway, 5), 0.0)
    assert fold_sum(gateway, {"a": weightless}, several=True).adapter is gateway


def test_adapters_of_other_modules_are_refused() -> None:
    gateway, other = gateway_of(1), Adapter(LAYOUT, 6.0, random_flat(LAYOUT, 1))
    with pytest.raises(ShapeError, match="different modules"):
        fold_sum(gateway, {"a": Departed(gateway, other)}, several=True)
