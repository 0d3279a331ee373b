"""The routers of `benchmarks/lib/routing_baselines.py`: one suite for both, then what each promises alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from router_cases import NAMES, WIDTH, clouds, prompts

from fedmoe.lora.adapter import Adapter, FloatMatrix, Layout, ModuleShape, ShapeError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from lib.routing_baselines import (
    FeatureRouter,
    SpectralRouter,
    SpectralWeights,
    likeliest,
    linear_router,
)

LAYOUT = Layout((ModuleShape("a", 10, 7), ModuleShape("b", 8, 5)), 4)


def random_adapter(seed: int, layout: Layout = LAYOUT) -> Adapter:
    draws = np.random.default_rng(seed)
    return Adapter(layout, 8.0, draws.standard_normal(layout.size).astype(np.float32))


def loud(place: int, count: int, seed: int) -> FloatMatrix:
    """Energies (prompts, rows) as if the expert at `place` answered louder."""
    draws = np.random.default_rng([seed, place])
    energies = draws.uniform(0.5, 1.5, (count, len(NAMES) * LAYOUT.rank))
    energies[:, place * LAYOUT.rank : (place + 1) * LAYOUT.rank] *= 4
    return energies.astype(np.float32)


def linear() -> FeatureRouter:
    return linear_router(clouds())


def spectral() -> FeatureRouter:
    adapters = {name: random_adapter(place) for place, name in enumerate(NAMES)}
    reference = np.random.default_rng(0).uniform(0.5, 1.5, (60, 12)).astype(np.float32)
    return SpectralRouter.of(adapters, reference)


Case = tuple[Callable[[], FeatureRouter], Callable[[int, int, int], FloatMatrix]]


@pytest.fixture(params=["linear", "spectral"])
def case(request: pytest.FixtureRequest) -> Case:
    """How to make the router, and prompts that belong to the expert at a place."""
    cases: dict[str, Case] = {
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
    for fit in (linear_router, SpectralRouter.of):
        with pytest.raises(ValueError, match="at least one expert"):
            fit({})


def test_a_linear_router_needs_prompts_of_every_expert_and_of_one_width() -> None:
    with pytest.raises(ValueError, match=r"not so: \['law'\]"):
        linear_router({"art": prompts(0, 4, 1), "law": np.zeros((0, WIDTH), np.float32)})
    with pytest.raises(ShapeError, match="one width"):
        linear_router({"art": prompts(0, 4, 1), "law": prompts(1, 4, 1, width=3)})


def test_a_linear_router_weighs_experts_alike_however_many_prompts_they_have() -> None:
    few, many = prompts(0, 5, 1, 3.0), prompts(1, 400, 1, 3.0)
    router = linear_router({"few": few, "many": many})
    assert likeliest(router, prompts(0, 60, 2, 3.0)).count("few") >= 45


def test_energies_are_those_of_the_dense_product() -> None:
    adapters = {"art": random_adapter(1), "law": random_adapter(2, LAYOUT.with_rank(2))}
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
    adapter = random_adapter(1)
    factors = {
        module.name: (np.linalg.inv(turn) @ a.astype(np.float64), 5 * b.astype(np.float64) @ turn)
        for module, a, b in adapter.factors()
    }
    plain, turned = (SpectralRouter.of({"x": given}) for given in (adapter, Adapter.from_factors(factors, 1.0)))
    x = np.random.default_rng(3).standard_normal((6, 10)).astype(np.float32)
    left, right = (router.energies(np.square(x @ router.projections["a"].T)) for router in (plain, turned))
    np.testing.assert_allclose(left, right, rtol=1e-3)


def test_a_reference_takes_out_that_one_expert_is_louder_on_everything() -> None:
    adapters = {name: random_adapter(place) for place, name in enumerate(NAMES)}
    bias = np.repeat([8.0, 1.0, 1.0], LAYOUT.rank).astype(np.float32)
    reference = np.random.default_rng(0).uniform(0.5, 1.5, (60, 12)).astype(np.float32) * bias
    features = loud(1, 30, 2) * bias
    assert "law" not in likeliest(SpectralRouter.of(adapters), features)
    assert set(likeliest(SpectralRouter.of(adapters, reference), features)) == {"law"}


def test_an_adapter_of_zeros_is_silent() -> None:
    router = SpectralRouter.of({"art": random_adapter(1), "law": Adapter.zeros(LAYOUT, 4.0)})
    x = np.random.default_rng(1).standard_normal((5, 10)).astype(np.float32)
    assert likeliest(router, np.square(x @ router.projections["a"].T)) == ("art",) * 5


def test_adapters_for_different_modules_are_not_compared() -> None:
    other = Layout((ModuleShape("a", 10, 7),), 4)
    with pytest.raises(ShapeError, match="different modules"):
        SpectralRouter.of({"art": random_adapter(1), "law": random_adapter(2, other)})


@pytest.mark.parametrize("top", [1, 2, 3])
def test_the_loudest_experts_of_a_token_share_its_weight_by_their_energies(
    top: int,
) -> None:
    adapters = {name: random_adapter(place) for place, name in enumerate(NAMES)}
    router = SpectralRouter.of(adapters)
    module = LAYOUT.modules[0]
    x = torch.randn(3, 11, module.in_features, generator=torch.Generator().manual_seed(2))
    found = SpectralWeights(router.projections, router.starts, top, torch.device("cpu"))(module.name, x).numpy()
    loud = np.stack(
        [
            np.square(x.numpy() @ (b @ a).T).sum(axis=-1) / np.square(b @ a).sum()
            for a, b in (adapters[name].module(module.name) for name in NAMES)
        ],
        axis=-1,
    )
    loud[loud < np.sort(loud, axis=-1)[..., [-top]]] = 0
    np.testing.assert_allclose(found, loud / loud.sum(axis=-1, keepdims=True), rtol=1e-3, atol=1e-5)


def test_more_experts_than_there_are_cannot_be_taken() -> None:
    with pytest.raises(ValueError, match="of 2 experts 1 to 2 can be taken, got 3"):
        SpectralWeights({}, (0, 1, 2), 3, torch.device("cpu"))
