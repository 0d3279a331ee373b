from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

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
    gram_of,
    laws,
    moments_of,
    norm,
    random_adapter,
    random_moments,
    seeds,
)

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape, ShapeError
from fedmoe.lora.algebra import exact_rank, recompress, scaled
from fedmoe.lora.kept_terms import KeptTerms
from fedmoe.lora.moments import LEAST_TOKENS, Gram, InputMoments
from fedmoe.lora.regmean import SCALE, regmean

LAYOUT = Layout((ModuleShape("q", 20, 12), ModuleShape("k", 20, 5), ModuleShape("up", 9, 31)), 3)
NAMES = ["a", "b", "c"]


def experts_and_moments(columns: int | None = None) -> tuple[dict[str, Adapter], dict[str, InputMoments]]:
    experts = {name: random_adapter(LAYOUT, seed) for seed, name in enumerate(NAMES)}
    return experts, {name: random_moments(LAYOUT, 10 + seed, columns) for seed, name in enumerate(NAMES)}


def module_bulk(adapter: Adapter, name: str) -> float:
    """Size of one module's product before anything cancels in it."""
    a, b = (factor.astype(np.float64) for factor in adapter.module(name))
    return adapter.scale * float((np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=0)).sum())


def dense_regmean(
    experts: Mapping[str, Adapter],
    moments: Mapping[str, InputMoments],
    scale: float = SCALE,
) -> tuple[Dense, Dense]:
    """The formula of the module, word by word, on dense matrices: the merged products, and M."""
    merged, metrics = {}, {}
    for module in next(iter(experts.values())).layout.modules:
        products = [dense(expert)[module.name] for expert in experts.values()]
        grams = [moments[name].approximate(module.name).dense() for name in experts]
        bulks = [module_bulk(expert, module.name) for expert in experts.values()]
        shares = [
            np.diagonal(g).mean() ** -0.5 if np.trace(w @ g @ w.T) > 1e-12 * size**2 * np.diagonal(g).mean() else 0.0
            for w, g, size in zip(products, grams, bulks, strict=True)
        ]
        total = np.sum([share * gram for share, gram in zip(shares, grams, strict=True)], axis=0)
        ridge = 0.01 * np.diagonal(total).mean() or 1.0
        unit = np.eye(module.in_features)
        right = [share * gram + 0.6 * ridge * unit for share, gram in zip(shares, grams, strict=True)]
        metrics[module.name] = total + ridge * unit
        above = np.sum([w @ n for w, n in zip(products, right, strict=True)], axis=0)
        merged[module.name] = scale * above @ np.linalg.inv(metrics[module.name])
    return merged, metrics


@laws
@given(st.data(), st.integers(2, 4), st.sampled_from([None, 2]))
def test_regmean_is_the_dense_formula(data: st.DataObject, count: int, columns: int | None) -> None:
    first = data.draw(adapters())
    modules = first.layout.modules
    experts = {"a": first} | {name: data.draw(adapters(modules)) for name in "bcd"[: count - 1]}
    moments = {name: random_moments(first.layout, data.draw(seeds), columns) for name in experts}
    merged = regmean(experts, moments)
    expected, _ = dense_regmean(experts, moments)
    size = sum(map(bulk, experts.values()))
    assert distance(dense(merged.adapter), expected) <= 1e-4 * size
    assert merged.adapter.rank == exact_rank(list(experts.values()))
    assert merged.truncation_error == 0


@pytest.mark.parametrize("columns", [None, 4])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_a_cut_is_the_best_of_its_rank_for_the_inputs(rank: int, columns: int | None) -> None:
    experts, moments = experts_and_moments(columns)
    cut = regmean(experts, moments, rank=rank)
    expected, metrics = dense_regmean(experts, moments)
    roots = {name: np.linalg.cholesky(metric) for name, metric in metrics.items()}
    seen = {name: expected[name] @ roots[name] for name in expected}
    lost = norm({name: (dense(cut.adapter)[name] - expected[name]) @ roots[name] for name in expected})
    tails = [np.linalg.svd(product, compute_uv=False)[rank:] for product in seen.values()]
    assert lost == pytest.approx(float(np.linalg.norm(np.concatenate(tails))), rel=1e-5)
    assert cut.truncation_error == pytest.approx(lost / norm(seen), rel=1e-5)
    assert cut.adapter.rank == rank
    for module, a, _ in cut.adapter.factors():
        used = np.arange(rank) < min(module.out_features, module.in_features)
        np.testing.assert_allclose(a @ a.T, np.diag(used), atol=1e-5)


def test_a_cut_in_the_plain_metric_loses_more_of_the_outputs() -> None:
    experts, moments = experts_and_moments()
    plain = recompress(regmean(experts, moments).adapter, 4).adapter
    expected, metrics = dense_regmean(experts, moments)
    roots = {name: np.linalg.cholesky(metric) for name, metric in metrics.items()}
    lost = norm({name: (dense(plain)[name] - expected[name]) @ roots[name] for name in expected})
    size = norm({name: expected[name] @ roots[name] for name in expected})
    assert lost / size > 1.05 * regmean(experts, moments, rank=4).truncation_error


def test_a_rank_by_energy_is_the_smallest_that_keeps_it_and_is_bounded() -> None:
    experts, moments = experts_and_moments()
    chosen = regmean(experts, moments, energy=0.9)
    expected, metrics = dense_regmean(experts, moments)
    kept = {}
    for name, product in expected.items():
        squares = np.linalg.svd(product @ np.linalg.cholesky(metrics[name]), compute_uv=False) ** 2
        kept[name] = np.cumsum(squares) / squares.sum()
    rank = chosen.adapter.rank
    assert 1 < rank < 9
    assert all(share[min(rank, len(share)) - 1] >= 0.9 for share in kept.values())
    assert any(share[rank - 2] < 0.9 for share in kept.values())
    assert regmean(experts, moments, energy=0.9, rank=2).adapter.rank == 2
    assert regmean(experts, moments, energy=1.0).adapter.rank == 9


@laws
@given(adapters(), seeds, st.sampled_from([None, "same"]))
def test_one_expert_alone_gives_itself_back(adapter: Adapter, seed: int, rank: str | None) -> None:
    moments = {"only": random_moments(adapter.layout, seed)}
    merged = regmean({"only": adapter}, moments, rank=adapter.rank if rank else None)
    size = bulk(adapter)
    assert distance(dense(merged.adapter), dense(adapter)) <= 1e-4 * size


def test_experts_with_equal_inputs_and_equal_outputs_give_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.lora.regmean.RIDGE", 1e-9)
    gram = np.eye(20)
    layout = Layout((ModuleShape("q", 20, 12),), 3)
    experts = {}
    for seed, name in enumerate(NAMES):
        expert = random_adapter(layout, seed)
        experts[name] = scaled(expert, 1 / norm(dense(expert)))
    moments = {name: moments_of({"q": gram}) for name in NAMES}
    merged = regmean(experts, moments, scale=1.0)
    mean = np.mean([dense(expert)["q"] for expert in experts.values()], axis=0)
    assert distance(dense(merged.adapter), {"q": mean}) <= 1e-6
    weighted = regmean(experts, moments, scale=1.0, weights={"a": 2.0, "b": 1.0, "c": 1.0})
    mean = np.average([dense(expert)["q"] for expert in experts.values()], axis=0, weights=[2, 1, 1])
    assert distance(dense(weighted.adapter), {"q": mean}) <= 1e-6


def test_experts_whose_inputs_lie_apart_all_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.lora.regmean.RIDGE", 1e-6)
    layout = Layout((ModuleShape("q", 20, 12),), 3)
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((20, 20)))[0]
    spaces = {name: basis[:, 6 * index : 6 * index + 6] for index, name in enumerate(NAMES)}
    experts = {name: random_adapter(layout, seed) for seed, name in enumerate(NAMES)}
    moments = {name: moments_of({"q": space @ space.T}) for name, space in spaces.items()}
    merged = dense(regmean(experts, moments, scale=1.0).adapter)["q"]
    for name, space in spaces.items():
        wanted = dense(experts[name])["q"] @ space
        assert np.linalg.norm(merged @ space - wanted) < 1e-4 * np.linalg.norm(wanted)


def test_an_expert_with_few_tokens_keeps_more_when_they_are_filled_up() -> None:
    """Its inputs look like those of all, but its moments hold three of them: the rest must not count as nobody's."""
    layout = Layout((ModuleShape("m", 24, 6),), 3)
    rng = np.random.default_rng(5)
    true = {name: gram_of(24, seed) for seed, name in enumerate(NAMES)}
    few = rng.standard_normal((3, 24)) @ np.linalg.cholesky(true["a"]).T
    experts = {name: random_adapter(layout, seed) for seed, name in enumerate(NAMES)}

    def lost(tokens: int) -> float:
        known = {name: moments_of({"m": gram}) for name, gram in true.items()}
        known["a"] = InputMoments(moments_of({"m": few.T @ few / 3}).modules, tokens, 0)
        change = dense(regmean(experts, known).adapter)["m"] - dense(experts["a"])["m"]
        return float(np.trace(change @ true["a"] @ change.T))

    assert lost(3) < 0.8 * lost(LEAST_TOKENS)


@laws
@given(st.permutations(NAMES), st.sampled_from([None, 4]))
def test_the_order_of_experts_does_not_change_a_bit(order: list[str], rank: int | None) -> None:
    experts, moments = experts_and_moments(4)
    straight = regmean(experts, moments, rank=rank)
    mixed = regmean({n: experts[n] for n in order}, {n: moments[n] for n in order}, rank=rank)
    assert straight.adapter.flat.tobytes() == mixed.adapter.flat.tobytes()
    assert straight.truncation_error == mixed.truncation_error


def test_experts_that_have_learned_nothing_yet_take_no_part() -> None:
    experts, moments = experts_and_moments()
    idle = Adapter.zeros(LAYOUT, 16.0)
    with_idle = regmean({**experts, "d": idle}, {**moments, "d": moments["a"]})
    assert distance(dense(with_idle.adapter), dense(regmean(experts, moments).adapter)) <= 1e-6 * norm(
        dense(experts["a"])
    )
    for rank in (None, 2):
        nothing = regmean({"d": idle, "e": idle}, {"d": moments["a"], "e": moments["b"]}, rank=rank)
        assert not any(product.any() for product in dense(nothing.adapter).values())
        assert nothing.truncation_error == 0


def test_missing_moments_and_foreign_modules_are_refused() -> None:
    experts, moments = experts_and_moments()
    with pytest.raises(ValueError, match=r"none of \['b', 'c'\]"):
        regmean(experts, {"a": moments["a"]})
    with pytest.raises(ValueError, match="no expert"):
        regmean({}, {})
    wrong = moments_of({"q": gram_of(9, 0), "k": gram_of(20, 0), "up": gram_of(9, 0)})
    with pytest.raises(ShapeError, match=r"moments of b: module q has 20 inputs, got 9 features"):
        regmean(experts, {**moments, "b": wrong})
    with pytest.raises(ShapeError, match=r"module up has 9 inputs, got none"):
        regmean(experts, {**moments, "c": moments_of({"q": gram_of(20, 0), "k": gram_of(20, 0)})})
    other = random_adapter(Layout((ModuleShape("q", 20, 12),), 3), 0)
    with pytest.raises(ShapeError, match="different modules"):
        regmean({**experts, "a": other}, moments)


@pytest.mark.parametrize("energy", [0.0, 1.1, float("nan")])
def test_settings_that_make_no_sense_are_refused(energy: float) -> None:
    experts, moments = experts_and_moments()
    with pytest.raises(ValueError, match="rank >= 1 and energy"):
        regmean(experts, moments, energy=energy)
    with pytest.raises(ValueError, match="rank >= 1"):
        regmean(experts, moments, rank=0)


@laws
@given(st.data(), st.integers(2, 4), st.sampled_from([None, 2]), st.sampled_from([None, 2]), st.booleans())
def test_terms_of_earlier_merges_leave_the_bits_of_a_merge_without_them(
    data: st.DataObject, count: int, columns: int | None, rank: int | None, thin: bool
) -> None:
    first = data.draw(adapters())
    modules = first.layout.modules
    experts = {"a": first} | {name: data.draw(adapters(modules)) for name in "bcd"[: count - 1]}
    tokens = LEAST_TOKENS // 2 if thin else LEAST_TOKENS
    kept = KeptTerms()
    moments = {
        name: replace(random_moments(first.layout, data.draw(seeds), columns), tokens=tokens) for name in experts
    }
    for _ in range(3):
        pushed = data.draw(st.sampled_from(sorted(experts)))
        experts = experts | {pushed: data.draw(adapters(modules))}
        if data.draw(st.booleans()):
            moments = moments | {pushed: random_moments(first.layout, data.draw(seeds), columns)}
        scale = data.draw(st.sampled_from([1.0, 1.3]))
        weights = {name: data.draw(st.sampled_from([1.0, 2.0])) for name in experts}
        with_terms = regmean(experts, moments, scale, weights, rank=rank, kept=kept)
        without = regmean(experts, moments, scale, weights, rank=rank)
        assert with_terms.adapter.flat.tobytes() == without.adapter.flat.tobytes()
        assert with_terms.truncation_error == without.truncation_error


def test_a_push_of_one_expert_rebuilds_and_solves_for_that_one_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, moments = experts_and_moments()
    moments = {name: replace(of_expert, tokens=LEAST_TOKENS) for name, of_expert in moments.items()}
    kept = KeptTerms()
    regmean(experts, moments, kept=kept)
    rebuilt: list[InputMoments] = []
    approximate = InputMoments.approximate

    def counted(of_expert: InputMoments, module: str) -> Gram:
        rebuilt.append(of_expert)
        return approximate(of_expert, module)

    monkeypatch.setattr(InputMoments, "approximate", counted)
    regmean(experts, moments, kept=kept)
    assert rebuilt == []
    regmean(experts | {"b": random_adapter(LAYOUT, 9)}, moments, kept=kept)
    assert {id(one) for one in rebuilt} == {id(moments["b"])}


def test_kept_terms_stay_within_their_bound() -> None:
    experts, moments = experts_and_moments()
    most = KeptTerms()
    regmean(experts, moments, kept=most)
    assert most.nbytes > 0
    for bound in (0, most.nbytes // 2):
        bounded = KeptTerms(bound)
        merged = [regmean(experts, moments, kept=bounded).adapter.flat.tobytes() for _ in range(2)]
        assert bounded.nbytes <= bound
        assert set(merged) == {regmean(experts, moments).adapter.flat.tobytes()}
