from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import adapters, bulk, dense, dense_sum, distance, laws, norm, random_adapter

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape, ShapeError
from fedmoe.lora.algebra import exact_rank, scaled, stack
from fedmoe.lora.merge import STRATEGIES, STRATEGIES_WITH_MOMENTS, damping, merge
from fedmoe.lora.moments import InputMoments, ModuleMoments, omega
from fedmoe.lora.regmean import SCALE, regmean

LAYOUT = Layout((ModuleShape("q", 20, 12), ModuleShape("up", 9, 31)), 4)
NAMES = ["python", "sql", "docs", "law"]
names = st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True)
strategies = st.sampled_from(sorted(STRATEGIES))


def random_moments(seed: int) -> InputMoments:
    rng = np.random.default_rng(seed)
    modules = {}
    for shape in LAYOUT.modules:
        inputs = rng.standard_normal((50, shape.in_features))
        gram = inputs.T @ inputs / 50
        sketch = gram @ omega(0, shape.name, shape.in_features, 4)
        modules[shape.name] = ModuleMoments(np.diagonal(gram).astype(np.float32), sketch.astype(np.float32))
    return InputMoments(modules, 5_000, 0)


MOMENTS = {name: random_moments(seed) for seed, name in enumerate(NAMES)}
EXPERTS = {name: random_adapter(LAYOUT, seed) for seed, name in enumerate(NAMES)}


@laws
@given(st.data(), names, strategies)
def test_a_merge_without_a_cut_is_the_dense_weighted_sum(data: st.DataObject, named: list[str], strategy: str) -> None:
    first = data.draw(adapters())
    experts = {name: data.draw(adapters(first.layout.modules)) for name in named}
    merged = merge(experts, strategy)
    weight = 1 / len(experts) if strategy == "weighted_average" else 1.0
    scale = damping(len(experts)) if strategy == "scaled" else 1.0
    terms = [(scale * weight, adapter) for adapter in experts.values()]
    size = sum(weight * bulk(adapter) for adapter in experts.values())
    assert distance(dense(merged.adapter), dense_sum(terms)) <= 1e-5 * size
    assert merged.truncation_error == 0
    assert dict(merged.weights) == dict.fromkeys(experts, weight)
    assert (merged.strategy, merged.scale, merged.notes) == (strategy, scale, ())
    assert merged.rank == exact_rank(list(experts.values()))


@laws
@given(adapters(), strategies)
def test_one_adapter_at_weight_one_gives_itself_back(adapter: Adapter, strategy: str) -> None:
    merged = merge({"only": adapter}, strategy)
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
    straight = merge(experts, strategy, rank=rank)
    mixed = merge({name: experts[name] for name in order}, strategy, rank=rank)
    assert straight.adapter.flat.tobytes() == mixed.adapter.flat.tobytes()
    assert list(straight.weights.items()) == list(mixed.weights.items())
    assert straight.truncation_error == mixed.truncation_error


def test_a_cut_says_what_it_lost() -> None:
    experts = {name: random_adapter(LAYOUT, seed) for seed, name in enumerate(NAMES)}
    exact, cut = merge(experts), merge(experts, rank=6)
    assert (exact.adapter.rank, cut.adapter.rank) == (exact_rank(list(experts.values())), 6)
    lost = distance(dense(cut.adapter), dense(exact.adapter)) / norm(dense(exact.adapter))
    assert lost > 0.1
    assert cut.truncation_error == pytest.approx(lost, rel=1e-5)


def test_unknown_strategies_no_experts_and_no_rank_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown strategy 'mean'; known: concat, regmean, scaled, sum, weighted"):
        merge({"a": random_adapter(LAYOUT, 0)}, "mean")
    with pytest.raises(ValueError, match="no expert"):
        merge({})
    with pytest.raises(ShapeError, match="rank"):
        merge({"a": random_adapter(LAYOUT, 0)}, rank=0)


def test_no_name_stands_for_two_strategies() -> None:
    assert set(STRATEGIES) == {"weighted_average", "sum", "concat", "scaled"}
    assert set(STRATEGIES_WITH_MOMENTS) == {"regmean"}


def test_concat_is_the_sum_by_another_name() -> None:
    assert merge(EXPERTS, "concat").adapter.flat.tobytes() == merge(EXPERTS, "sum").adapter.flat.tobytes()
    exact = stack([(1.0, EXPERTS[name]) for name in sorted(EXPERTS)])
    assert merge(EXPERTS, "concat").adapter.flat.tobytes() == exact.flat.tobytes()


def test_a_scale_multiplies_the_whole_sum() -> None:
    merged = merge(EXPERTS, "scaled", scale=0.25)
    terms = [(0.25, expert) for expert in EXPERTS.values()]
    assert distance(dense(merged.adapter), dense_sum(terms)) <= 1e-6 * norm(dense(merged.adapter))
    assert merged.scale == 0.25


@pytest.mark.parametrize(
    ("strategy", "scale", "said"),
    [
        ("sum", 0.5, "sum has no scale; use the strategy 'scaled'"),
        ("weighted_average", 1.0, "has no scale"),
        ("scaled", 0.0, "positive"),
        ("scaled", float("nan"), "positive"),
        ("regmean", float("inf"), "positive"),
    ],
)
def test_scales_that_make_no_sense_are_refused(strategy: str, scale: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        merge(EXPERTS, strategy, scale=scale, moments=MOMENTS)


def test_regmean_is_the_function_of_that_name() -> None:
    for rank, energy in ((None, None), (6, None), (None, 0.8), (5, 0.99)):
        merged = merge(EXPERTS, "regmean", rank=rank, energy=energy, scale=1.1, moments=MOMENTS)
        direct = regmean(EXPERTS, MOMENTS, 1.1, rank=rank, energy=energy)
        assert merged.adapter.flat.tobytes() == direct.adapter.flat.tobytes()
        assert (merged.truncation_error, merged.scale) == (direct.truncation_error, 1.1)
        assert merged.weights == dict.fromkeys(sorted(EXPERTS), 1.0)
    whole = merge(EXPERTS, "regmean", moments=MOMENTS)
    assert (whole.scale, whole.rank) == (SCALE, exact_rank(list(EXPERTS.values())))


def test_regmean_without_moments_is_refused_unless_another_strategy_is_named() -> None:
    some = {name: MOMENTS[name] for name in ("python", "docs")}
    with pytest.raises(
        ValueError, match=r"regmean needs the input moments of every expert and has none of \['law', 'sql'\]"
    ):
        merge(EXPERTS, "regmean", moments=some)
    with pytest.raises(ValueError, match=r"none of \['docs', 'law', 'python', 'sql'\]"):
        merge(EXPERTS, "regmean")
    with pytest.raises(ValueError, match="'regmean' is no strategy without moments; choose from concat, scaled"):
        merge(EXPERTS, "regmean", without_moments="regmean")
    instead = merge(EXPERTS, "regmean", moments=some, scale=1.2, without_moments="scaled")
    plain = merge(EXPERTS, "scaled")
    assert instead.adapter.flat.tobytes() == plain.adapter.flat.tobytes()
    assert (instead.strategy, instead.scale) == ("scaled", damping(len(EXPERTS)))
    assert instead.notes == ("regmean was asked for; without input moments of law, sql it became scaled",)
    assert merge(EXPERTS, "regmean", moments=MOMENTS, without_moments="scaled").notes == ()


@pytest.mark.parametrize("strategy", ["sum", "weighted_average", "scaled", "regmean"])
def test_a_rank_by_energy_is_the_smallest_that_keeps_it_and_is_bounded(strategy: str) -> None:
    exact = merge(EXPERTS, strategy, moments=MOMENTS)
    chosen = merge(EXPERTS, strategy, energy=0.95, moments=MOMENTS)
    assert 1 < chosen.rank < exact.rank
    assert 0 < chosen.truncation_error <= 0.05**0.5
    lower = merge(EXPERTS, strategy, energy=0.95, rank=2, moments=MOMENTS)
    assert (lower.rank, lower.adapter.flat.tobytes()) == (
        2,
        merge(EXPERTS, strategy, rank=2, moments=MOMENTS).adapter.flat.tobytes(),
    )
    assert lower.truncation_error > chosen.truncation_error


def test_a_rank_by_energy_is_at_most_64() -> None:
    layout = Layout((ModuleShape("q", 80, 90),), 40)
    experts = {name: random_adapter(layout, seed) for seed, name in enumerate("ab")}
    assert merge(experts, "sum", energy=0.999999).rank == 64
    assert merge(experts, "sum", energy=0.999999, rank=70).rank == 70
    with pytest.raises(ValueError, match="energy"):
        merge(experts, "sum", energy=1.5)


@laws
@given(st.permutations(NAMES), st.sampled_from(["scaled", "regmean"]))
def test_no_option_makes_the_order_matter(order: list[str], strategy: str) -> None:
    experts = {**EXPERTS, "law": scaled(EXPERTS["law"], 5.0)}
    straight = merge(experts, strategy, energy=0.9, moments=MOMENTS)
    mixed = merge({name: experts[name] for name in order}, strategy, energy=0.9, moments=MOMENTS)
    assert straight.adapter.flat.tobytes() == mixed.adapter.flat.tobytes()
