"""The gateway of a strategy that needs the experts' input moments: with them, without them, and as a transaction."""

from __future__ import annotations

import numpy as np
import pytest
from support import LAYOUT, MANIFEST, make_flat, make_submission

from fedmoe.coordinator import Aggregation, CentralCoordinator, ExpertMoments
from fedmoe.lora.merge import merge
from fedmoe.lora.moments import InputMoments, ModuleMoments

REGMEAN = Aggregation(strategy="regmean")


def moments(seed: int) -> ExpertMoments:
    """Moments of random inputs; the sketches are the whole matrices."""
    x = np.random.default_rng(seed).normal(size=(40, 6)).astype(np.float32)
    one = ModuleMoments(np.square(x).mean(axis=0), x.T @ x / np.float32(len(x)))
    return ExpertMoments(InputMoments({module.name: one for module in LAYOUT.modules}, 4_000, 0), f"{seed}" * 64)


def trained(aggregation: Aggregation = REGMEAN) -> CentralCoordinator:
    coordinator = CentralCoordinator(aggregation)
    for seed, name in enumerate(["python", "sql"]):
        coordinator.register_expert(name, MANIFEST)
        coordinator.push_update(make_submission(name), make_flat(seed))
    return coordinator


def learn(coordinator: CentralCoordinator, **found: ExpertMoments | None) -> None:
    for name, one in found.items():
        transaction = coordinator.transaction()
        transaction.learn_moments(name, one)
        coordinator.publish(transaction)


def test_with_moments_of_every_expert_it_is_their_regmean() -> None:
    coordinator = trained()
    learn(coordinator, python=moments(1), sql=moments(2))
    gateway = coordinator.gateway()
    assert (gateway.strategy, gateway.notes, gateway.version) == ("regmean", (), 6)
    assert gateway.statistics == {"python": "1" * 64, "sql": "2" * 64}
    assert gateway.statistics_tokens == {"python": 4_000, "sql": 4_000}
    expected = merge(
        {name: expert.adapter for name, expert in coordinator.experts.items()},
        "regmean",
        energy=0.99,
        moments={"python": moments(1).moments, "sql": moments(2).moments},
    )
    np.testing.assert_array_equal(gateway.adapter.flat, expected.adapter.flat)


def test_moments_of_few_tokens_are_filled_up_and_the_gateway_says_of_how_many() -> None:
    coordinator, usual = trained(), trained()
    few = ExpertMoments(InputMoments(moments(2).moments.modules, 417, 0), "2" * 64)
    learn(coordinator, python=moments(1), sql=few)
    learn(usual, python=moments(1), sql=moments(2))
    gateway = coordinator.gateway()
    assert gateway.statistics_tokens == {"python": 4_000, "sql": 417}
    assert [note.partition(" only")[0] for note in gateway.notes] == ["sql has input moments of 417 tokens"]
    assert gateway.digest != usual.gateway().digest


def test_without_moments_of_one_expert_it_is_exactly_the_scaled_sum() -> None:
    coordinator = trained()
    learn(coordinator, python=moments(1))
    gateway, scaled = coordinator.gateway(), trained(Aggregation(strategy="scaled")).gateway()
    assert (gateway.strategy, gateway.digest, gateway.statistics) == ("scaled", scaled.digest, {})
    assert gateway.notes == ("regmean was asked for; without input moments of sql it became scaled",)


def test_new_moments_make_a_new_gateway_of_the_same_experts() -> None:
    coordinator = trained()
    learn(coordinator, python=moments(1), sql=moments(2))
    before = coordinator.gateway()
    learn(coordinator, sql=moments(3))
    after = coordinator.gateway()
    assert (after.version, after.sources) == (before.version + 1, before.sources)
    assert (after.statistics["sql"], after.digest != before.digest) == ("3" * 64, True)


@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_that_was_asked_for_is_kept(rank: int) -> None:
    coordinator = trained(Aggregation(strategy="regmean", gateway_rank=rank))
    learn(coordinator, python=moments(1), sql=moments(2))
    assert coordinator.gateway().adapter.rank == rank


def test_a_draft_forgets_moments_with_everything_else_since_a_mark() -> None:
    transaction = trained().transaction()
    first, second = moments(1), moments(2)
    transaction.learn_moments("python", first)
    mark = transaction.savepoint()
    transaction.learn_moments("python", second)
    transaction.learn_moments("sql", None)
    assert transaction.gateway_version == mark.gateway_version + 2
    transaction.rollback_to(mark)
    assert (transaction.moments, transaction.gateway_version) == ({"python": first}, mark.gateway_version)
