"""The sequence router: what it says of prompts, and what it is fitted from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from router_cases import NAMES, WIDTH, clouds, likeliest, prompts, statistics

from fedmoe.gateway.routers import SequenceRouter
from fedmoe.lora.adapter import ShapeError
from fedmoe.lora.prompt_statistics import PromptStatistics


def sequence() -> SequenceRouter:
    return SequenceRouter.fit(statistics(clouds()))


def test_prompts_find_their_expert() -> None:
    router = sequence()
    assert router.names == NAMES
    for place, name in enumerate(NAMES):
        assert likeliest(router, prompts(place, 50, 9)).count(name) >= 48


def test_probabilities_add_up_to_one_and_the_largest_names_the_expert() -> None:
    router, features = sequence(), prompts(1, 20, 3)
    probabilities = router.probabilities(features)
    assert probabilities.shape == (20, 3)
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-9)
    assert likeliest(router, features) == tuple(NAMES[place] for place in probabilities.argmax(axis=1))


def test_a_prompt_is_routed_alike_alone_and_in_a_batch() -> None:
    router, features = sequence(), prompts(2, 7, 4)
    alone = np.concatenate([router.probabilities(features[[row]]) for row in range(7)])
    np.testing.assert_allclose(router.probabilities(features), alone, rtol=1e-9, atol=1e-12)


def test_no_prompt_is_no_route() -> None:
    router = sequence()
    assert likeliest(router, np.zeros((0, router.width), np.float32)) == ()


def test_features_that_are_none_are_refused() -> None:
    router = sequence()
    with pytest.raises(ShapeError, match=f"{router.width} columns"):
        router.probabilities(np.zeros((2, router.width + 1), np.float32))
    with pytest.raises(ShapeError, match="must be a matrix"):
        router.probabilities(np.zeros(router.width, np.float32))
    with pytest.raises(ValueError, match="NaN or an infinity"):
        router.probabilities(np.full((1, router.width), np.nan, np.float32))


def test_no_expert_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one expert"):
        SequenceRouter.fit({})


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
