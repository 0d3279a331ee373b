from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import adapters, bulk, dense, dense_sum, distance, laws, norm, random_adapter

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape, ShapeError
from fedmoe.lora.merge import STRATEGIES, merge, plan_weights

LAYOUT = Layout((ModuleShape("q", 20, 12), ModuleShape("up", 9, 31)), 4)
NAMES = ["python", "sql", "docs", "law"]
names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
strategies = st.sampled_from(sorted(STRATEGIES))


@laws
@given(st.data(), names, strategies)
def test_a_merge_without_a_cut_is_the_dense_weighted_sum(data: st.DataObject, named: list[str], strategy: str) -> None:
    first = data.draw(adapters())
    experts = {name: data.draw(adapters(first.layout.modules)) for name in named}
    merged = merge(experts, strategy)
    weight = 1.0 if strategy == "sum" else 1 / len(experts)
    terms = [(weight, adapter) for adapter in experts.values()]
    size = sum(weight * bulk(adapter) for adapter in experts.values())
    assert distance(dense(merged.adapter), dense_sum(terms)) <= 1e-5 * size
    assert merged.truncation_error == 0
    assert dict(merged.weights) == dict.fromkeys(experts, weight)


@laws
@given(adapters(), strategies)
def test_one_adapter_at_weight_one_gives_itself_back(adapter: Adapter, strategy: str) -> None:
    for merged in (merge({"only": adapter}, strategy), merge({"only": adapter}, strategy, {"only": 1.0})):
        assert merged.weights == {"only": 1.0}
        assert merged.adapter.rank == adapter.rank
        assert distance(dense(merged.adapter), dense(adapter)) <= 1e-6 * bulk(adapter)
        for (_, a, _), (_, original, _) in zip(merged.adapter.factors(), adapter.factors(), strict=True):
            np.testing.assert_array_equal(a, original)
    if adapter.alpha == adapter.rank:
        np.testing.assert_array_equal(merge({"only": adapter}, strategy).adapter.flat, adapter.flat)


@laws
@given(adapters(), strategies)
def test_one_adapter_is_itself_after_a_cut_that_keeps_its_rank(adapter: Adapter, strategy: str) -> None:
    merged = merge({"only": adapter}, strategy, rank=adapter.rank)
    assert distance(dense(merged.adapter), dense(adapter)) <= 1e-6 * bulk(adapter)


@laws
@given(st.permutations(NAMES), strategies, st.sampled_from([None, 3]))
def test_the_order_of_experts_does_not_change_a_bit(order: list[str], strategy: str, rank: int | None) -> None:
    experts = {name: random_adapter(LAYOUT, seed) for seed, name in enumerate(NAMES)}
    weights = {"python": 0.1, "sql": 0.7, "docs": 1e-9, "law": 3.3}
    for given_weights in (None, weights):
        shuffled = {name: given_weights[name] for name in order} if given_weights else None
        straight = merge(experts, strategy, given_weights, rank)
        mixed = merge({name: experts[name] for name in order}, strategy, shuffled, rank)
        assert straight.adapter.flat.tobytes() == mixed.adapter.flat.tobytes()
        assert list(straight.weights.items()) == list(mixed.weights.items())
        assert straight.truncation_error == mixed.truncation_error


def test_sums_of_given_weights_do_not_depend_on_the_order_they_come_in() -> None:
    weights = {"a": 0.1, "b": 0.2, "c": 0.3, "d": 1e-17}
    backwards = dict(reversed(weights.items()))
    assert sum(weights.values()) != sum(backwards.values())  # the case is a real one
    assert plan_weights(list(weights), given=weights) == plan_weights(list(weights), given=backwards)


def test_given_weights_are_shares_of_an_average_and_factors_of_a_sum() -> None:
    experts = {"a": random_adapter(LAYOUT, 0), "b": random_adapter(LAYOUT, 1)}
    for strategy, a, b in (("weighted_average", 0.25, 0.75), ("sum", 1.0, 3.0)):
        merged = merge(experts, strategy, {"a": 1.0, "b": 3.0})
        assert merged.weights == {"a": a, "b": b}
        expected = dense_sum([(a, experts["a"]), (b, experts["b"])])
        assert distance(dense(merged.adapter), expected) <= 1e-6 * norm(expected)


def test_a_cut_says_what_it_lost() -> None:
    experts = {name: random_adapter(LAYOUT, seed) for seed, name in enumerate(NAMES)}
    exact, cut = merge(experts), merge(experts, rank=6)
    assert (exact.adapter.rank, cut.adapter.rank) == (16, 6)
    lost = distance(dense(cut.adapter), dense(exact.adapter)) / norm(dense(exact.adapter))
    assert lost > 0.1
    assert cut.truncation_error == pytest.approx(lost, rel=1e-5)


@pytest.mark.parametrize(
    ("given_weights", "said"),
    [
        ({"a": 1.0}, "name every expert"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "name every expert"),
        ({"a": -1.0, "b": 2.0}, "not negative"),
        ({"a": float("nan"), "b": 1.0}, "finite"),
        ({"a": float("inf"), "b": 1.0}, "finite"),
        ({"a": 1e308, "b": 1e308}, "finite"),
        ({"a": 0.0, "b": 0.0}, "not all zero"),
    ],
)
def test_weights_that_make_no_sense_are_refused(given_weights: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        plan_weights(["a", "b"], "weighted_average", given_weights)


def test_unknown_strategies_no_experts_and_no_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown strategy 'mean'; known: sum, weighted_average"):
        plan_weights(["a"], "mean")
    with pytest.raises(ValueError, match="no expert"):
        merge({})
    with pytest.raises(ShapeError, match="rank"):
        merge({"a": random_adapter(LAYOUT, 0)}, rank=0)
