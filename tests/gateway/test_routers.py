"""Routers: one suite for all of them, then what each promises alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
from builders import random_adapter
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.gateway.routers import FeatureRouter, LinearRouter, SequenceRouter, SpectralRouter, likeliest
from fedmoe.lora.adapter import Adapter, FloatMatrix, Layout, ModuleShape, ShapeError
from fedmoe.lora.prompt_statistics import PromptStatistics

NAMES = ("art", "law", "music")
WIDTH = 12


def prompts(place: int, count: int, seed: int, apart: float = 6.0, width: int = WIDTH) -> FloatMatrix:
    """Prompts of the expert at `place`: a normal cloud around a centre of its own."""
    draws = np.random.default_rng([seed, place])
    centre = np.random.default_rng(place).standard_normal(width)
    centre *= apart / np.linalg.norm(centre)
    return (centre + draws.standard_normal((count, width))).astype(np.float32)


def clouds(count: int = 40, seed: int = 1, apart: float = 6.0, width: int = WIDTH) -> dict[str, FloatMatrix]:
    return {name: prompts(place, count, seed, apart, width) for place, name in enumerate(NAMES)}


def statistics(data: Mapping[str, FloatMatrix]) -> dict[str, PromptStatistics]:
    return {name: PromptStatistics.of(rows) for name, rows in data.items()}


LAYOUT = Layout((ModuleShape("a", 10, 7), ModuleShape("b", 8, 5)), 4)


def loud(place: int, count: int, seed: int) -> FloatMatrix:
    """Energies (prompts, rows) as if the expert at `place` answered louder."""
    draws = np.random.default_rng([seed, place])
    energies = draws.uniform(0.5, 1.5, (count, len(NAMES) * LAYOUT.rank))
    energies[:, place * LAYOUT.rank : (place + 1) * LAYOUT.rank] *= 4
    return energies.astype(np.float32)


def sequence() -> FeatureRouter:
    return SequenceRouter.fit(statistics(clouds()))


def linear() -> FeatureRouter:
    return LinearRouter.fit(clouds())


def spectral() -> FeatureRouter:
    adapters = {name: random_adapter(LAYOUT, place, 1.0, 8.0) for place, name in enumerate(NAMES)}
    reference = np.random.default_rng(0).uniform(0.5, 1.5, (60, 12)).astype(np.float32)
    return SpectralRouter.of(adapters, reference)


Case = tuple[Callable[[], FeatureRouter], Callable[[int, int, int], FloatMatrix]]


@pytest.fixture(params=["sequence", "linear", "spectral"])
def case(request: pytest.FixtureRequest) -> Case:
    """How to make the router, and prompts that belong to the expert at a place."""
    cases: dict[str, Case] = {
        "sequence": (sequence, prompts),
        "linear": (linear, prompts),
        "spectral": (spectral, loud),
    }
    return cases[request.param]


def test_prompts_find_their_expert(case: Case) -> None:
    make, draw = case
    router = make()
    assert router.names == NAMES
    for place, name in enumerate(NAMES):
        assert likeliest(router, draw(place, 50, 9)).count(name) >= 48


def test_probabilities_add_up_to_one_and_the_largest_names_the_expert(case: Case) -> None:
    make, draw = case
    router, features = make(), draw(1, 20, 3)
    probabilities = router.probabilities(features)
    assert probabilities.shape == (20, 3)
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-9)
    assert likeliest(router, features) == tuple(NAMES[place] for place in probabilities.argmax(axis=1))


def test_a_prompt_is_routed_alike_alone_and_in_a_batch(case: Case) -> None:
    make, draw = case
    router, features = make(), draw(2, 7, 4)
    alone = np.concatenate([router.probabilities(features[[row]]) for row in range(7)])
    np.testing.assert_allclose(router.probabilities(features), alone, rtol=1e-9, atol=1e-12)


def test_no_prompt_is_no_route(case: Case) -> None:
    router = case[0]()
    assert likeliest(router, np.zeros((0, router.width), np.float32)) == ()


def test_features_that_are_none_are_refused(case: Case) -> None:
    router = case[0]()
    with pytest.raises(ShapeError, match=f"{router.width} columns"):
        router.probabilities(np.zeros((2, router.width + 1), np.float32))
    with pytest.raises(ShapeError, match="must be a matrix"):
        router.probabilities(np.zeros(router.width, np.float32))
    with pytest.raises(ValueError, match="NaN or an infinity"):
        router.probabilities(np.full((1, router.width), np.nan, np.float32))


def test_no_expert_is_refused() -> None:
    for fit in (SequenceRouter.fit, LinearRouter.fit, SpectralRouter.of):
        with pytest.raises(ValueError, match="at least one expert"):
            fit({})


def test_one_expert_gets_everything() -> None:
    router = SequenceRouter.fit(statistics({"only": prompts(0, 10, 1)}))
    assert likeliest(router, prompts(2, 3, 1)) == ("only",) * 3


def test_the_order_of_the_experts_does_not_matter() -> None:
    data = statistics(clouds())
    backwards = dict(reversed(data.items()))
    features = prompts(1, 5, 2)
    left, right = (SequenceRouter.fit(parts).probabilities(features) for parts in (data, backwards))
    np.testing.assert_array_equal(left, right)


def test_a_fixed_shrinkage_is_the_textbook_discriminant() -> None:
    data, shrinkage = clouds(30), 0.3
    router = SequenceRouter.fit(statistics(data), shrinkage)
    means = np.stack([data[name].mean(axis=0, dtype=np.float64) for name in NAMES])
    pooled = np.mean([np.cov(data[name].T.astype(np.float64), bias=True) for name in NAMES], axis=0)
    scale = np.sqrt(np.diag(pooled))
    shrunk = (1 - shrinkage) * pooled + shrinkage * np.diag(scale**2)
    x = prompts(1, 9, 7).astype(np.float64)
    weights = np.linalg.solve(shrunk, means.T)
    scores = x @ weights - 0.5 * np.einsum("ij,ji->i", means, weights)
    found = np.log(router.probabilities(prompts(1, 9, 7)))
    relative = scores - scores[:, :1]
    # All scores are divided by one temperature of at least 1.
    ratios = relative[:, 1:] / (found - found[:, :1])[:, 1:]
    np.testing.assert_allclose(ratios, ratios[0, 0], rtol=1e-4)
    assert ratios[0, 0] >= 1 - 1e-4


def test_more_features_than_prompts_are_no_trouble() -> None:
    data = clouds(count=8, apart=12.0, width=200)
    router = SequenceRouter.fit(statistics(data))
    assert np.isfinite(router.weights).all()
    for place, name in enumerate(NAMES):
        found = likeliest(SequenceRouter.fit(statistics(data)), prompts(place, 30, 8, 12.0, 200))
        assert sum(given == name for given in found) >= 28


@given(st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_units_of_the_features_do_not_matter(seed: int) -> None:
    units = np.exp2(np.random.default_rng(seed).integers(-6, 6, WIDTH)).astype(np.float32)
    data, features = clouds(20), prompts(0, 6, seed)
    plain = SequenceRouter.fit(statistics(data)).probabilities(features)
    scaled = SequenceRouter.fit(statistics({name: rows * units for name, rows in data.items()}))
    # Which directions are kept does depend on units; what is left of that is far below what decides.
    np.testing.assert_allclose(scaled.probabilities(features * units), plain, rtol=0, atol=1e-3)


def test_a_feature_that_never_moves_decides_nothing_by_itself() -> None:
    data = {
        name: np.concatenate([rows, np.ones((len(rows), 1), np.float32)], axis=1) for name, rows in clouds().items()
    }
    router = SequenceRouter.fit(statistics(data))
    features = np.concatenate([prompts(1, 20, 3), np.full((20, 1), 1.001, np.float32)], axis=1)
    assert likeliest(router, features).count("law") >= 19


def test_another_expert_is_one_more_centroid() -> None:
    data = statistics(clouds())
    before = SequenceRouter.fit({name: data[name] for name in NAMES[:2]})
    after = SequenceRouter.fit(data)
    assert sum(name == "music" for name in likeliest(after, prompts(2, 40, 6))) >= 38
    for place, name in enumerate(NAMES[:2]):
        features = prompts(place, 40, 6)
        for router in (before, after):
            assert sum(found == name for found in likeliest(router, features)) >= 38


@pytest.mark.parametrize("apart", [1.5, 2.0])
def test_a_router_does_not_claim_more_than_it_knows_of_prompts_it_never_saw(apart: float) -> None:
    data = clouds(count=48, apart=apart, width=60)
    router = SequenceRouter.fit(statistics(data))
    probabilities = [router.probabilities(prompts(place, 200, 99, apart, 60)) for place in range(3)]
    right = np.mean([found.argmax(axis=1) == place for place, found in enumerate(probabilities)])
    sure = np.mean([found.max(axis=1).mean() for found in probabilities])
    # The temperature is of routers that saw half of the prompts, so it errs on the careful side.
    assert right - 0.15 < sure < right + 0.03
    assert right > 0.6


def test_statistics_that_make_no_router_are_refused() -> None:
    mixed = {"art": PromptStatistics.of(prompts(0, 5, 1)), "law": PromptStatistics.of(prompts(1, 5, 1, width=3))}
    with pytest.raises(ShapeError, match="one width"):
        SequenceRouter.fit(mixed)
    same = np.ones((4, WIDTH), np.float32)
    with pytest.raises(ValueError, match="two prompts that differ"):
        SequenceRouter.fit({"art": PromptStatistics.of(same), "law": PromptStatistics.of(same + 1)})
    for shrinkage in (0.0, 1.5):
        with pytest.raises(ValueError, match="shrinkage must be"):
            SequenceRouter.fit(statistics(clouds()), shrinkage)


def test_a_linear_router_needs_prompts_of_every_expert_and_of_one_width() -> None:
    with pytest.raises(ValueError, match=r"not so: \['law'\]"):
        LinearRouter.fit({"art": prompts(0, 4, 1), "law": np.zeros((0, WIDTH), np.float32)})
    with pytest.raises(ShapeError, match="one width"):
        LinearRouter.fit({"art": prompts(0, 4, 1), "law": prompts(1, 4, 1, width=3)})


def test_a_linear_router_weighs_experts_alike_however_many_prompts_they_have() -> None:
    few, many = prompts(0, 5, 1, 3.0), prompts(1, 400, 1, 3.0)
    router = LinearRouter.fit({"few": few, "many": many})
    assert likeliest(router, prompts(0, 60, 2, 3.0)).count("few") >= 45


def test_energies_are_those_of_the_dense_product() -> None:
    adapters = {"art": random_adapter(LAYOUT, 1, 1.0, 8.0), "law": random_adapter(LAYOUT.with_rank(2), 2, 1.0, 8.0)}
    router = SpectralRouter.of(adapters)
    x = np.random.default_rng(3).standard_normal((6, 8)).astype(np.float32)
    found = router.energies(np.square(x @ router.projections["b"].T))
    for column, adapter in enumerate(adapters.values()):
        a, b = adapter.module("b")
        dense = b.astype(np.float64) @ a
        expected = np.square(x @ dense.T).sum(axis=1) / np.square(dense).sum()
        np.testing.assert_allclose(found[:, column], expected, rtol=1e-4)


def test_how_a_product_is_split_into_factors_does_not_matter() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0] * 3
    adapter = random_adapter(LAYOUT, 1, 1.0, 8.0)
    factors = {
        module.name: (np.linalg.inv(turn) @ a.astype(np.float64), 5 * b.astype(np.float64) @ turn)
        for module, a, b in adapter.factors()
    }
    plain, turned = (SpectralRouter.of({"x": given}) for given in (adapter, Adapter.from_factors(factors, 1.0)))
    x = np.random.default_rng(3).standard_normal((6, 10)).astype(np.float32)
    left, right = (router.energies(np.square(x @ router.projections["a"].T)) for router in (plain, turned))
    np.testing.assert_allclose(left, right, rtol=1e-3)


def test_a_reference_takes_out_that_one_expert_is_louder_on_everything() -> None:
    adapters = {name: random_adapter(LAYOUT, place, 1.0, 8.0) for place, name in enumerate(NAMES)}
    bias = np.repeat([8.0, 1.0, 1.0], LAYOUT.rank).astype(np.float32)
    reference = np.random.default_rng(0).uniform(0.5, 1.5, (60, 12)).astype(np.float32) * bias
    features = loud(1, 30, 2) * bias
    assert "law" not in likeliest(SpectralRouter.of(adapters), features)
    assert set(likeliest(SpectralRouter.of(adapters, reference), features)) == {"law"}


def test_an_adapter_of_zeros_is_silent() -> None:
    router = SpectralRouter.of({"art": random_adapter(LAYOUT, 1, 1.0, 8.0), "law": Adapter.zeros(LAYOUT, 4.0)})
    x = np.random.default_rng(1).standard_normal((5, 10)).astype(np.float32)
    assert likeliest(router, np.square(x @ router.projections["a"].T)) == ("art",) * 5


def test_adapters_for_different_modules_are_not_compared() -> None:
    other = Layout((ModuleShape("a", 10, 7),), 4)
    with pytest.raises(ShapeError, match="different modules"):
        SpectralRouter.of({"art": random_adapter(LAYOUT, 1, 1.0, 8.0), "law": random_adapter(other, 2, 1.0, 8.0)})
