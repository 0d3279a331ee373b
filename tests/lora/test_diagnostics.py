from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import adapters, bulk, dense, laws, norm, random_adapter
from numpy.typing import NDArray

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape, ShapeError
from fedmoe.lora.algebra import product_norm, scaled
from fedmoe.lora.diagnostics import Overlap, audit

LAYOUT = Layout((ModuleShape("q", 20, 12), ModuleShape("up", 9, 31)), 4)
NAMES = ["a", "b", "c"]


def with_factors(adapter: Adapter, other: Adapter, factor: str) -> Adapter:
    """`adapter` with the A or the B of `other`."""
    mine = {module.name: (a, b) for module, a, b in adapter.factors()}
    theirs = {module.name: (a, b) for module, a, b in other.factors()}
    if factor == "A":
        return Adapter.from_factors({name: (theirs[name][0], mine[name][1]) for name in mine}, adapter.alpha)
    return Adapter.from_factors({name: (mine[name][0], theirs[name][1]) for name in mine}, adapter.alpha)


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> list[float]:
    """Of the principal angles between two column spaces, from dense orthonormal bases."""
    bases = []
    for tall in (left, right):
        u, sizes, _ = np.linalg.svd(tall.astype(np.float64), full_matrices=False)
        bases.append(u[:, sizes > 1e-6 * sizes[0]])
    return [float(value) for value in np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)]


@laws
@given(adapters())
def test_the_norm_is_that_of_the_dense_products(adapter: Adapter) -> None:
    assert product_norm(adapter) == pytest.approx(norm(dense(adapter)), rel=1e-6, abs=1e-7 * bulk(adapter))


@laws
@given(st.permutations(NAMES))
def test_overlaps_are_the_dense_cosines_whatever_the_order(order: list[str]) -> None:
    experts = {name: random_adapter(LAYOUT, seed) for seed, name in enumerate(NAMES)}
    found = audit({name: experts[name] for name in order})
    assert [(pair.first, pair.second) for pair in found.pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    for pair in found.pairs:
        first, second = experts[pair.first], experts[pair.second]
        factors = [(first.module(name), second.module(name)) for name in ("q", "up")]
        inputs = [cosine for left, right in factors for cosine in cosines(left[0].T, right[0].T)]
        outputs = [cosine for left, right in factors for cosine in cosines(left[1], right[1])]
        assert pair.inputs.median == pytest.approx(np.median(inputs), abs=1e-6)
        assert pair.inputs.maximum == pytest.approx(max(inputs), abs=1e-6)
        assert pair.outputs.median == pytest.approx(np.median(outputs), abs=1e-6)
        assert pair.outputs.maximum == pytest.approx(max(outputs), abs=1e-6)
    assert asdict(found) == asdict(audit(experts))


def test_a_common_start_of_a_shows_in_what_is_read_and_of_b_in_what_is_written() -> None:
    one, two = random_adapter(LAYOUT, 0), random_adapter(LAYOUT, 1)
    (same_a,) = audit({"one": one, "two": with_factors(two, one, "A")}).pairs
    (same_b,) = audit({"one": one, "two": with_factors(two, one, "B")}).pairs
    assert same_a.inputs.median == pytest.approx(1.0)
    assert same_a.outputs.median < 0.9
    assert same_b.outputs.median == pytest.approx(1.0)
    assert same_b.inputs.median < 0.9


def test_the_size_of_factors_does_not_change_an_angle() -> None:
    one, two = random_adapter(LAYOUT, 0), random_adapter(LAYOUT, 1)
    (usual,), (smaller,) = audit({"a": one, "b": two}).pairs, audit({"a": one, "b": scaled(two, 1e-12)}).pairs
    assert usual.outputs.median == pytest.approx(smaller.outputs.median)
    assert usual.inputs == smaller.inputs


def test_an_expert_that_does_nothing_shares_no_output() -> None:
    found = audit({"a": random_adapter(LAYOUT, 0), "b": Adapter.zeros(LAYOUT, 4.0)})
    assert found.norms["b"] == 0
    assert found.pairs[0].outputs == found.pairs[0].inputs == Overlap(0.0, 0.0)


def test_directions_that_repeat_are_one_direction() -> None:
    one = random_adapter(LAYOUT, 0)
    twice = Adapter.from_factors(
        {module.name: (np.repeat(a[:1], 4, axis=0), np.repeat(b[:, :1], 4, axis=1)) for module, a, b in one.factors()},
        4.0,
    )
    (pair,) = audit({"one": one, "twice": twice}).pairs
    assert pair.inputs.median == pytest.approx(1.0)
    assert pair.outputs.median == pytest.approx(1.0)


def test_the_predicted_rank_keeps_the_energy_of_the_sum() -> None:
    one = random_adapter(LAYOUT, 0)
    same = audit({"a": one, "b": scaled(one, 2.0), "c": one})
    assert (same.stacked_rank, same.predicted_rank, same.energy) == (12, 4, 0.99)
    apart = audit({name: random_adapter(LAYOUT, seed) for seed, name in enumerate(NAMES)}, energy=0.5)
    assert 1 < apart.predicted_rank < 9
    assert apart.norms["a"] == pytest.approx(norm(dense(one)), rel=1e-6)


def test_an_audit_is_json() -> None:
    found = asdict(audit({"b": random_adapter(LAYOUT, 0), "a": random_adapter(LAYOUT, 1)}))
    assert json.loads(json.dumps(found)) == found
    assert list(found) == ["norms", "pairs", "stacked_rank", "predicted_rank", "energy"]


def test_no_experts_and_different_modules_are_refused() -> None:
    with pytest.raises(ShapeError, match="no expert"):
        audit({})
    with pytest.raises(ShapeError, match="different modules"):
        audit({"a": random_adapter(LAYOUT, 0), "b": random_adapter(Layout((ModuleShape("q", 20, 12),), 4), 0)})
