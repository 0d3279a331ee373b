"""Where experts left an online gateway, who is ready to be merged, and what a background merge would be made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import LAYOUT, MANIFEST, accepted, make_flat, make_submission, registered

from fedmoe.coordinator import Aggregation, CentralCoordinator, Transaction
from fedmoe.federation.events import CountedUpdate, ExpertRebased, GatewayMerged, UpdateAccepted
from fedmoe.federation.online_gateway import (
    BranchPoint,
    OnlineGateway,
    count_steps,
    plan_merge,
    step_counters,
    steps_between,
)
from fedmoe.lora.moments import InputMoments, ModuleMoments
from fedmoe.lora.update_rules import polynomial
from fedmoe.runtime.errors import RefusedError

ONLINE = Aggregation(merge_after=5)


def told(version: int, steps: int | None, worker: str = "w1", expert: str = "python") -> UpdateAccepted:
    info = {} if steps is None else {"steps": float(steps)}
    return replace(accepted(version, worker, expert), info=info)


def drafted(**steps: int) -> Transaction:
    """Experts by name, each with one update of so many steps (none for 0)."""
    transaction = CentralCoordinator(ONLINE).transaction()
    for name, count in steps.items():
        transaction.register(name, "w1", MANIFEST, None, 0.0)
        if count:
            update = transaction.admit(make_submission(name), 0.0)
            transaction.apply(replace(update, info={"steps": float(count)}), make_flat(count))
    return transaction


def online_gateway_of(transaction: Transaction) -> OnlineGateway:
    assert transaction.online_gateway is not None
    return transaction.online_gateway


def moments(seed: int) -> InputMoments:
    random = np.random.default_rng(seed)
    parts = {}
    for module in LAYOUT.modules:
        x = random.normal(size=(50, module.in_features)).astype(np.float32)
        parts[module.name] = ModuleMoments(np.square(x).mean(axis=0), (x.T @ x / np.float32(50))[:, :3].copy())
    return InputMoments(parts, 5_000, 0)


@pytest.mark.parametrize(
    ("before", "now", "steps"), [(None, 7, 7), (3, 7, 4), (7, 7, 0), (7, 2, 2), (None, None, 1), (7, None, 1)]
)
def test_steps_are_the_rise_of_a_workers_counter(before: int | None, now: int | None, steps: int) -> None:
    assert steps_between(before, now) == steps


def test_each_workers_counter_counts_for_itself_and_over_what_was_taken_back() -> None:
    updates = [told(1, 4), told(2, 10, "w2"), told(3, 6), told(4, None), told(5, 7), told(6, 1, "w2")]
    steps = [one.steps for one in count_steps([registered(), *updates], updates)]
    assert steps == [4, 10, 2, 1, 1, 1]
    assert [one.steps for one in count_steps(updates, [updates[2]])] == [2]
    assert step_counters(updates) == {"w1": 7, "w2": 1}


@given(st.lists(st.integers(0, 5), max_size=8), st.integers(0, 8), st.integers(1, 4))
def test_what_a_merge_has_not_seen_is_what_landed_later_or_waited_in_the_buffer(
    steps: list[int], seen: int, buffer_size: int
) -> None:
    since = tuple(CountedUpdate(told(version + 1, None), count) for version, count in enumerate(steps))
    seen = min(seen, len(since))
    rest = BranchPoint(since=since).unseen(BranchPoint(since=since[:seen]), buffer_size)
    assert rest is not None
    assert since[: len(since) - len(rest)] + rest == since
    assert len(since) - len(rest) == seen // buffer_size * buffer_size


def test_an_expert_that_did_not_only_train_on_cannot_be_merged_as_it_was() -> None:
    one, two, three = (CountedUpdate(told(version, None), 1) for version in (1, 2, 3))
    folded = BranchPoint(since=(one, two))
    for changed in (BranchPoint(since=(one,)), BranchPoint(since=(one, three)), BranchPoint(since=(two,))):
        assert changed.unseen(folded, 1) is None
    elsewhere = ExpertRebased("python", 1, "0" * 64, 0, 3, 0.0)
    assert BranchPoint(elsewhere, (one, two)).unseen(folded, 1) is None
    assert BranchPoint(since=(one, two, three)).unseen(folded, 1) == (three,)


def test_only_who_trained_enough_is_merged() -> None:
    transaction = drafted(docs=4, python=5, sql=9)
    plan = plan_merge(online_gateway_of(transaction), transaction.experts, {}, 5, polynomial)
    assert plan is not None
    assert plan.experts.keys() == {"python", "sql"}
    assert (plan.staleness, plan.weights) == ({"python": 0, "sql": 0}, {"python": 1.0, "sql": 1.0})
    assert plan_merge(online_gateway_of(transaction), transaction.experts, {}, 10, polynomial) is None
    assert plan_merge(online_gateway_of(transaction), transaction.experts, {}, 5, polynomial, least_updates=2) is None


def test_an_expert_that_nobody_trains_any_more_is_merged_with_what_it_has() -> None:
    transaction = drafted(docs=4, python=0, sql=9)
    ended = online_gateway_of(transaction).branch_points["docs"].since[-1].update.at
    assert (
        plan_merge(online_gateway_of(transaction), transaction.experts, {}, 10, polynomial, idle_since=ended - 1)
        is None
    )
    plan = plan_merge(online_gateway_of(transaction), transaction.experts, {}, 10, polynomial, idle_since=ended)
    assert plan is not None
    assert "docs" in plan.experts
    assert "python" not in plan.experts  # it did no step, so there is nothing of it to fold
    assert plan.notes[0] == "docs was merged after 4 of 10 steps: nobody had trained it for a while"


def test_moments_are_needed_and_used_of_all_that_have_trained() -> None:
    transaction = drafted(docs=1, python=5, sql=0)
    known = {"python": moments(1), "sql": moments(2)}
    without = plan_merge(online_gateway_of(transaction), transaction.experts, known, 5, polynomial)
    assert without is not None
    assert without.moments is None
    assert without.notes == ("without input moments of docs the deltas were added as they are, scaled",)
    whole = plan_merge(online_gateway_of(transaction), transaction.experts, known | {"docs": moments(3)}, 5, polynomial)
    assert whole is not None
    assert whole.moments is not None
    assert (set(whole.moments), whole.notes) == ({"docs", "python"}, ())


def test_a_merge_with_thin_moments_says_so() -> None:
    transaction = drafted(docs=5, python=5)
    few = InputMoments(moments(1).modules, 417, 0)
    plan = plan_merge(
        online_gateway_of(transaction), transaction.experts, {"docs": few, "python": moments(2)}, 5, polynomial
    )
    assert plan is not None
    assert [note.partition(" only")[0] for note in plan.notes] == ["docs has input moments of 417 tokens"]


def test_staleness_is_the_merges_since_an_expert_left() -> None:
    transaction = drafted(docs=5, python=5)
    for number in (1, 2, 3):
        event = GatewayMerged(number, number, "0" * 64, {"docs": number}, {}, {"docs": 1.0}, 0.0, 0.0, (), 0.0)
        transaction.apply(event, gateway=online_gateway_of(transaction).adapter)
    went_on = ExpertRebased("docs", 2, "0" * 64, 0, 2, 0.0)
    transaction.apply(went_on, rebuilt=ONLINE.rule.init(online_gateway_of(transaction).adapter.flat))
    transaction.apply(told(3, 14, expert="docs"), make_flat(3))
    plan = plan_merge(online_gateway_of(transaction), transaction.experts, {}, 5, polynomial)
    assert plan is not None
    assert plan.staleness == {"docs": 1, "python": 3}
    assert plan.weights == {"docs": 2**-0.5, "python": 0.5}


def test_the_first_gateway_does_nothing_and_its_version_follows_the_federation() -> None:
    coordinator = CentralCoordinator(ONLINE)
    coordinator.register_expert("python", MANIFEST)
    assert coordinator.gateway().version == 1
    coordinator.push_update(make_submission(), make_flat(1))
    gateway = coordinator.gateway()
    assert (gateway.version, gateway.strategy, gateway.sources) == (2, "living", {})
    assert not any(b.any() for _, _, b in gateway.adapter.factors())


def test_a_mark_brings_the_distances_back() -> None:
    transaction = drafted(python=3)
    before, mark = online_gateway_of(transaction), transaction.savepoint()
    transaction.apply(told(2, 8), make_flat(2))
    assert online_gateway_of(transaction).branch_points["python"].steps == 8
    transaction.rollback_to(mark)
    assert online_gateway_of(transaction) is before


def test_without_the_mode_nothing_of_it_is_kept() -> None:
    coordinator = CentralCoordinator()
    coordinator.register_expert("python", MANIFEST)
    coordinator.push_update(make_submission(), make_flat(1))
    assert coordinator.transaction().online_gateway is None
    assert coordinator.gateway().online_gateway is None


@pytest.mark.parametrize("options", [{"merge_after": 0}, {"merge_after": 3, "enable_gateway": False}])
def test_a_gateway_to_go_on_from_needs_a_gateway_and_a_step(options: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match="after 1 step or more"):
        Aggregation(**options)


def test_which_start_a_worker_may_count_on() -> None:
    starts: list[tuple[Aggregation, Literal["initial", "gateway"], Literal["initial", "gateway"]]] = [
        (ONLINE, "gateway", "initial"),
        (Aggregation(), "initial", "gateway"),
    ]
    for aggregation, own, other in starts:
        assert aggregation.start_from == own
        aggregation.check_start(None)
        aggregation.check_start(aggregation.start_from)
        with pytest.raises(RefusedError, match=f"asks for: {other}"):
            aggregation.check_start(other)


def test_all_experts_share_the_first_a() -> None:
    transaction = drafted(python=0, sql=0)
    one, other = transaction.experts["python"], transaction.experts["sql"]
    np.testing.assert_array_equal(one.state.weights, other.state.weights)
    np.testing.assert_array_equal(one.state.weights, online_gateway_of(transaction).adapter.flat)
    ordinary = CentralCoordinator()
    python, sql = (ordinary.register_expert(name, MANIFEST).state.weights for name in ("python", "sql"))
    assert not np.array_equal(python, sql)
