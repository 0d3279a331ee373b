from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import LAYOUT, MANIFEST, make_adapter, make_flat, make_submission

from fedmoe.coordinator import Aggregation, CentralCoordinator, GatewayModel, GatewayPlan, seed_of
from fedmoe.experts import ExpertModel, check_manifest
from fedmoe.federation.events import ExpertRegistered, ExpertRolledBack, UpdateAccepted, UpdateHeld, WorkerRetracted
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.codec import digest
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.update_rules import RULES
from fedmoe.runtime.errors import RefusedError

Dense = dict[str, NDArray[np.float64]]


def with_experts(*names: str, aggregation: Aggregation | None = None) -> CentralCoordinator:
    coordinator = CentralCoordinator(aggregation)
    for name in names:
        coordinator.register_expert(name, MANIFEST)
    return coordinator


def push(coordinator: CentralCoordinator, seed: int, base_version: int, expert: str = "python") -> UpdateAccepted:
    update = coordinator.push_update(make_submission(expert, base_version), make_flat(seed))
    assert isinstance(update, UpdateAccepted)
    return update


def dense(adapter: Adapter) -> Dense:
    return {
        module.name: adapter.alpha / adapter.rank * (b.astype(np.float64) @ a.astype(np.float64))
        for module, a, b in adapter.factors()
    }


# One expert: versions, staleness, and how an update lands.


def test_a_new_expert_starts_at_version_0_as_the_base_model() -> None:
    expert = with_experts("python").expert("python")
    assert expert.version == 0
    assert all(not product.any() for product in dense(expert.adapter).values())
    assert all(a.any() for _, a, _ in expert.adapter.factors())


@settings(max_examples=30, deadline=None)
@given(
    st.floats(1e-3, 10),
    st.lists(st.integers(0, 3), min_size=1, max_size=8),
    st.sampled_from(["constant", "polynomial", "hinge", "exponential"]),
)
def test_an_update_adds_learning_rate_times_staleness_weight_times_delta_exactly(
    rate: float, behind: list[int], staleness: str
) -> None:
    coordinator = with_experts("python", aggregation=Aggregation(rate, staleness))
    expected = coordinator.expert("python").state.weights
    for seed, lag in enumerate(behind):
        version = coordinator.expert("python").version
        tau = min(lag, version)
        accepted = push(coordinator, seed, version - tau)
        weight = {
            "constant": 1.0,
            "polynomial": (1 + tau) ** -0.5,
            "hinge": 1.0 if tau <= 4 else 1 / (10 * (tau - 4) + 1),
            "exponential": math.exp(-0.1 * tau),
        }[staleness]
        assert accepted.coefficient == pytest.approx(rate * weight, rel=1e-15)
        expected = expected + np.float32(accepted.coefficient) * make_flat(seed)
        np.testing.assert_array_equal(coordinator.expert("python").state.weights, expected)
        assert (accepted.staleness, accepted.version) == (tau, version + 1)
        assert coordinator.expert("python").version == version + 1


@pytest.mark.parametrize("staleness", ["constant", "polynomial", "hinge", "exponential"])
def test_a_fresh_update_weighs_exactly_one(staleness: str) -> None:
    coordinator = with_experts("python", aggregation=Aggregation(staleness=staleness))
    before = coordinator.expert("python").state.weights
    assert push(coordinator, 1, 0).coefficient == 1.0
    np.testing.assert_array_equal(coordinator.expert("python").state.weights, before + make_flat(1))


@pytest.mark.parametrize(
    ("staleness", "weights"),
    [
        ("constant", [1, 1, 1, 1, 1, 1, 1]),
        ("polynomial", [1, 2**-0.5, 3**-0.5, 0.5, 5**-0.5, 6**-0.5, 7**-0.5]),
        ("hinge", [1, 1, 1, 1, 1, 1 / 11, 1 / 21]),
        ("exponential", [math.exp(-0.1 * tau) for tau in range(7)]),
    ],
)
def test_updates_that_were_all_made_from_version_0_fade_as_documented(staleness: str, weights: list[float]) -> None:
    coordinator = with_experts("python", aggregation=Aggregation(staleness=staleness))
    assert [push(coordinator, seed, 0).coefficient for seed in range(7)] == pytest.approx(weights, rel=1e-12)


def test_too_stale_is_refused_with_the_newest_version_and_changes_nothing() -> None:
    coordinator = with_experts("python", aggregation=Aggregation(max_staleness=2))
    for seed in range(3):
        push(coordinator, seed, 0)
    before = coordinator.expert("python")
    with pytest.raises(RefusedError, match=r"3 versions behind python version 3; at most 2.*Pull the new") as refused:
        push(coordinator, 9, 0)
    assert refused.value.code == "too_stale"
    assert refused.value.facts == {"newest_version": 3, "staleness": 3}
    assert coordinator.expert("python") is before
    assert push(coordinator, 9, 1).staleness == 2


def test_without_a_limit_a_week_old_update_is_taken() -> None:
    coordinator = with_experts("python")
    for seed in range(50):
        push(coordinator, seed, seed)
    assert push(coordinator, 99, 0).coefficient == pytest.approx(51**-0.5)


def test_a_version_that_does_not_exist_yet_is_refused_with_the_newest() -> None:
    coordinator = with_experts("python")
    push(coordinator, 1, 0)
    with pytest.raises(RefusedError, match="based on version 2 of python, which is at version 1") as refused:
        push(coordinator, 2, 2)
    assert (refused.value.code, refused.value.facts) == ("unknown_version", {"newest_version": 1})
    assert coordinator.expert("python").version == 1


def test_an_unknown_expert_is_refused_naming_those_there_are() -> None:
    with pytest.raises(RefusedError, match="no expert 'ruby'; registered: none") as refused:
        CentralCoordinator().expert("ruby")
    assert refused.value.code == "unknown_expert"
    with pytest.raises(RefusedError, match="no expert 'ruby'; registered: python, sql"):
        push(with_experts("sql", "python"), 1, 0, "ruby")


def test_finite_deltas_that_overflow_an_expert_are_refused() -> None:
    """Each of them is a number; their sum would be an infinity, and the next difference of infinities a NaN."""
    coordinator = with_experts("python")
    huge = np.full(LAYOUT.size, 3e38, np.float32)
    coordinator.push_update(make_submission(), huge)
    before = coordinator.expert("python")
    with pytest.raises(RefusedError, match=r"layers.0.q.lora_A of python would hold an infinity") as refused:
        coordinator.push_update(make_submission(base_version=1), huge)
    assert refused.value.code == "not_finite"
    assert coordinator.expert("python") is before
    assert coordinator.gateway_version == 2


def test_an_update_of_unusual_norm_is_held_as_the_committer_would() -> None:
    coordinator = with_experts("python", aggregation=Aggregation(hold_norm=2.0))
    for version in range(6):
        coordinator.push_update(replace(make_submission(base_version=version), norm=1.0), make_flat(version))
    before, gateway_version = coordinator.expert("python"), coordinator.gateway_version
    held = coordinator.push_update(replace(make_submission(base_version=6), norm=9.0), make_flat(9))
    assert isinstance(held, UpdateHeld)
    assert held.identity in coordinator.quarantine.held
    assert (coordinator.expert("python"), coordinator.gateway_version) == (before, gateway_version)


@pytest.mark.parametrize("rule", ["nesterov", "adam"])
def test_a_moment_that_overflows_is_refused_too(rule: str) -> None:
    coordinator = with_experts("python", aggregation=Aggregation(server_optimizer=rule))
    with pytest.raises(RefusedError) as refused:
        coordinator.push_update(make_submission(), np.full(LAYOUT.size, 3.4e38, np.float32))
    assert refused.value.code == "not_finite"


@pytest.mark.parametrize("rule", sorted(RULES))
def test_an_experts_digest_is_that_of_its_adapter(rule: str) -> None:
    coordinator = with_experts("python", aggregation=Aggregation(server_optimizer=rule))
    first = coordinator.expert("python").digest
    push(coordinator, 1, 0)
    expert = coordinator.expert("python")
    assert expert.digest == digest(expert.adapter) != first
    assert not expert.adapter.flat.flags.writeable


# Registration.


def test_registering_again_changes_nothing() -> None:
    coordinator = with_experts("python")
    push(coordinator, 1, 0)
    before, version = coordinator.expert("python"), coordinator.gateway_version
    assert coordinator.register_expert("python", MANIFEST, seed=99) is before
    assert coordinator.gateway_version == version


def test_workers_of_one_expert_share_its_start_and_experts_differ() -> None:
    one, other = with_experts("python", "sql"), with_experts("python")
    assert one.expert("python").digest == other.expert("python").digest != one.expert("sql").digest
    assert seed_of("python") != seed_of("sql")
    chosen = CentralCoordinator()
    chosen.register_expert("python", MANIFEST, seed=5)
    assert chosen.expert("python").digest != one.expert("python").digest
    assert chosen.expert("python").digest == ExpertModel.initial("x", MANIFEST, 5, RULES["sgd"]).digest


def swapped_shape(manifest: Manifest) -> Manifest:
    return replace(manifest, layout=Layout((ModuleShape("layers.0.q", 4, 6), manifest.layout.modules[1]), 2))


@pytest.mark.parametrize(
    ("other", "code", "told"),
    [
        (
            replace(MANIFEST, base=replace(MANIFEST.base, weights_hash="c" * 64)),
            "base_mismatch",
            "expected a{64}.*got c{64}",
        ),
        (
            replace(MANIFEST, base=replace(MANIFEST.base, tokenizer_hash="d" * 64)),
            "base_mismatch",
            "tokenizer_hash: expected b{64}",
        ),
        (replace(MANIFEST, layout=LAYOUT.with_rank(8)), "lora_mismatch", "rank: expected 2, got 8"),
        (replace(MANIFEST, alpha=8.0), "lora_mismatch", "lora_alpha: expected 4, got 8"),
        (swapped_shape(MANIFEST), "lora_mismatch", "layers.0.q: expected 6 -> 4 features, got 4 -> 6"),
        (replace(MANIFEST, layout=Layout(LAYOUT.modules[:1], 2)), "lora_mismatch", "module missing: layers.0.v"),
        (
            replace(MANIFEST, layout=Layout((*LAYOUT.modules, ModuleShape("extra", 2, 2)), 2)),
            "lora_mismatch",
            "module not expected: extra",
        ),
    ],
)
def test_a_manifest_unlike_the_federations_is_refused_saying_how(other: Manifest, code: str, told: str) -> None:
    coordinator = with_experts("python")
    for name in ("python", "new"):
        with pytest.raises(RefusedError, match=told) as refused:
            coordinator.register_expert(name, other)
        assert refused.value.code == code
    assert list(coordinator.experts) == ["python"]
    assert coordinator.manifest == MANIFEST


def test_of_many_differences_five_are_told_and_the_rest_counted() -> None:
    modules = tuple(ModuleShape(f"m{number}", 2, 2) for number in range(9))
    with pytest.raises(RefusedError, match=r"m0;.*m4; and 5 more") as refused:
        check_manifest(
            replace(MANIFEST, layout=Layout(modules, 2)),
            replace(MANIFEST, layout=Layout((ModuleShape("m9", 2, 2),), 2)),
        )
    assert "m5" not in refused.value.detail


# The gateway.


def test_the_gateways_version_rises_with_every_accepted_update_and_no_refused_one() -> None:
    coordinator = with_experts("python", "sql", aggregation=Aggregation(max_staleness=0))
    versions = [coordinator.gateway().version]
    for seed in range(4):
        push(coordinator, seed, seed // 2, ("python", "sql")[seed % 2])
        versions.append(coordinator.gateway().version)
        with pytest.raises(RefusedError):
            push(coordinator, seed, 0)
        assert coordinator.gateway().version == versions[-1]
    assert versions == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(("strategy", "weight"), [("weighted_average", 1 / 3), ("sum", 1.0)])
def test_the_gateway_is_the_dense_weighted_sum_of_its_experts(strategy: str, weight: float) -> None:
    coordinator = with_experts("python", "sql", "law", aggregation=Aggregation(strategy=strategy))
    for seed, name in enumerate(["python", "sql", "law", "sql"]):
        push(coordinator, seed, 0, name)
    gateway = coordinator.gateway()
    merged = dense(gateway.adapter)
    for module in LAYOUT.modules:
        expected = sum(weight * dense(expert.adapter)[module.name] for expert in coordinator.experts.values())
        np.testing.assert_allclose(merged[module.name], expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    assert dict(gateway.weights) == pytest.approx(dict.fromkeys(["python", "sql", "law"], weight))
    assert dict(gateway.sources) == {"law": 1, "python": 1, "sql": 2}
    assert (gateway.strategy, gateway.truncation_error) == (strategy, 0.0)


def test_a_gateway_cut_to_a_rank_says_what_it_lost() -> None:
    coordinator = with_experts("python", "sql", "law", aggregation=Aggregation(gateway_rank=1))
    for seed, name in enumerate(["python", "sql", "law"]):
        push(coordinator, seed, 0, name)
    assert coordinator.gateway().adapter.rank == 1
    assert 0 < coordinator.gateway().truncation_error < 1


def test_the_gateway_is_built_once_per_version() -> None:
    coordinator = with_experts("python")
    first = coordinator.gateway()
    assert coordinator.gateway() is first
    push(coordinator, 1, 0)
    assert coordinator.gateway() is not first


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("strategy", ["weighted_average", "scaled", "regmean"])
@pytest.mark.parametrize("trained", [False, True])
def test_a_plan_says_what_the_merge_will_be_made_of(strategy: str, rank: int | None, trained: bool) -> None:
    coordinator = with_experts("python", "sql", aggregation=Aggregation(strategy=strategy, gateway_rank=rank))
    for number, name in enumerate(("python", "sql") if trained else ()):
        push(coordinator, number, 0, name)
    plan = coordinator.gateway_plan()
    assert coordinator.built is None
    assert coordinator.gateway_plan() is plan
    merged = coordinator.gateway()
    assert facts_of(merged) == facts_of(plan)
    assert coordinator.gateway_plan() is merged


def facts_of(plan: GatewayPlan) -> dict[str, object]:
    return {fact.name: getattr(plan, fact.name) for fact in fields(GatewayPlan)}


def test_the_same_experts_at_the_same_versions_give_the_same_gateway_bytes() -> None:
    def build(order: list[str]) -> GatewayModel:
        coordinator = with_experts(*order)
        for seed, name in enumerate(order * 2):
            push(coordinator, len(name) + 10 * (seed // 3), 0, name)
        return coordinator.gateway()

    one, other = build(["python", "sql", "law"]), build(["law", "python", "sql"])
    assert (one.digest, dict(one.sources)) == (other.digest, dict(other.sources))
    np.testing.assert_array_equal(one.adapter.flat, other.adapter.flat)


def test_a_coordinator_without_gateway_says_so_and_takes_updates() -> None:
    coordinator = CentralCoordinator(enable_gateway=False)
    coordinator.register_expert("python", MANIFEST)
    push(coordinator, 1, 0)
    with pytest.raises(RefusedError, match=r"without a gateway.*--enable-gateway") as refused:
        coordinator.gateway()
    assert refused.value.code == "gateway_disabled"
    assert coordinator.gateway_version == 2


def test_a_gateway_of_no_experts_is_refused() -> None:
    with pytest.raises(RefusedError, match="there is none yet") as refused:
        CentralCoordinator().gateway()
    assert refused.value.code == "gateway_not_initialised"


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: Aggregation(staleness="linear"),
            "unknown staleness 'linear'; known: constant, exponential, hinge, polynomial",
        ),
        (lambda: Aggregation(server_optimizer="sgdm"), "unknown server_optimizer 'sgdm'"),
        (lambda: Aggregation(strategy="mean"), "unknown strategy 'mean'"),
    ],
)
def test_an_unknown_choice_is_refused_naming_the_known(make: Callable[[], Aggregation], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()


# Drafts.


def test_a_draft_is_seen_by_nobody_before_it_is_published() -> None:
    coordinator = with_experts("python")
    view, version = coordinator.experts, coordinator.gateway_version
    transaction = coordinator.transaction()
    transaction.register("sql", "w1", MANIFEST, None, 5.0)
    transaction.apply(transaction.admit(make_submission(), 6.0), make_flat(1))
    assert transaction.expert("python").version == 1
    assert [type(event) for event in transaction.events] == [ExpertRegistered, UpdateAccepted]
    assert coordinator.experts == view
    assert (list(view), coordinator.gateway_version) == (["python"], version)
    coordinator.publish(transaction)
    assert coordinator.gateway_version == version + 2
    assert view["python"].version == 0  # a reader keeps the view it took


def test_a_draft_judges_by_what_it_has_decided_so_far() -> None:
    transaction = with_experts("python").transaction()
    staleness = []
    for seed in range(3):
        accepted = transaction.admit(make_submission(sequence=seed), 0.0)
        transaction.apply(accepted, make_flat(seed))
        staleness.append((accepted.staleness, accepted.version))
    assert staleness == [(0, 1), (1, 2), (2, 3)]


def test_a_draft_goes_back_to_a_mark_as_often_as_asked() -> None:
    transaction = CentralCoordinator().transaction()
    empty = transaction.savepoint()
    transaction.register("python", "w1", MANIFEST, None, 5.0)
    mark = transaction.savepoint()
    for _ in range(2):
        transaction.register("sql", "w1", MANIFEST, None, 5.0)
        transaction.apply(transaction.admit(make_submission(), 6.0), make_flat(1))
        transaction.rollback_to(mark)
        assert (list(transaction.experts), transaction.experts["python"].version) == (["python"], 0)
        assert (len(transaction.events), transaction.gateway_version, transaction.manifest) == (1, 1, MANIFEST)
    transaction.rollback_to(empty)
    assert (transaction.experts, transaction.events, transaction.gateway_version, transaction.manifest) == (
        {},
        [],
        0,
        None,
    )


def test_rollback_and_retraction_are_versions_of_their_own() -> None:
    transaction = with_experts("python").transaction()
    start = transaction.expert("python").state
    transaction.apply(transaction.admit(make_submission(), 0.0), make_flat(1))
    transaction.apply(ExpertRolledBack("python", 0, 2, "bad data", 7.0), rebuilt=start)
    assert transaction.expert("python").state is start
    assert transaction.expert("python").version == 2
    transaction.apply(WorkerRetracted("python", "w1", 1, 3, "", 8.0), rebuilt=start)
    assert transaction.expert("python").version == 3
    assert transaction.gateway_version == 4


def test_two_adapters_of_equal_numbers_have_equal_digests() -> None:
    assert digest(make_adapter(1)) == digest(make_adapter(1)) != digest(make_adapter(2))
    assert digest(make_adapter(1)) != digest(make_adapter(1, alpha=8.0))
