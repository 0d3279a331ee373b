"""An online gateway: who trained enough is merged into it and goes on from it, and a crash changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import numpy as np
import pytest
from crash_house import House, assert_same_state
from online_house import (
    ONLINE,
    difference,
    gateway,
    gateway_merges,
    interrupted_merge,
    learn,
    moments,
    online_gateway_of,
    open_online,
)
from support import fold, make_body, make_flat

from fedmoe.coordinator import Aggregation
from fedmoe.federation.events import ExpertRebased
from fedmoe.lora.algebra import product_norm
from fedmoe.lora.online_merge import ExpertDelta, add_into_gateway
from fedmoe.lora.online_merge import merge_into_gateway as merge_with_moments
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.upkeep.background_merge import MergeOvertakenError
from fedmoe.wire.contract.messages import RetractRequest


@pytest.fixture
def house() -> Iterator[House]:
    """Folds when told to; two experts."""
    with_two = open_online()
    yield with_two
    with_two.service.close()


def test_all_experts_start_from_one_first_gateway_that_does_nothing(house: House) -> None:
    np.testing.assert_array_equal(house.expert("python").state.weights, house.expert("sql").state.weights)
    assert gateway(house).sources == {}
    assert product_norm(gateway(house).adapter) == 0


def test_one_expert_alone_is_the_gateway_and_goes_on_from_itself() -> None:
    house = House.open(ONLINE, merges_by_itself=False)
    house.register()
    house.train(["w1"] * 3)
    trained = house.expert().adapter
    assert fold(house.service) == 1
    assert difference(trained, gateway(house).adapter) < 1e-5
    assert house.expert().version == 4
    np.testing.assert_array_equal(house.expert().state.weights, gateway(house).adapter.flat)
    house.service.close()


def test_who_is_ready_is_merged_and_nobody_waits(house: House) -> None:
    house.train(["w1"] * 3, "python")
    house.train(["w2"] * 2, "sql")
    before = house.expert("sql").state
    assert fold(house.service) == 1
    assert house.expert("sql").state is before
    assert gateway(house).sources == {"python": 3}
    house.train(["w2"], "sql")
    assert fold(house.service) == 2
    assert [event.staleness for event in gateway_merges(house)] == [{"python": 0}, {"sql": 1}]
    assert gateway_merges(house)[1].weights == {"sql": pytest.approx(2**-0.5)}
    assert gateway(house).sources == {"python": 3, "sql": 3}
    np.testing.assert_array_equal(house.expert("sql").state.weights, gateway(house).adapter.flat)


def test_a_stale_expert_counts_in_full_unless_told_otherwise() -> None:
    house = open_online(Aggregation(merge_after=3))
    for name in ("python", "sql"):
        house.train(["w1"] * 3, name)
        fold(house.service)
    assert [(event.staleness, event.weights) for event in gateway_merges(house)] == [
        ({"python": 0}, {"python": 1.0}),
        ({"sql": 1}, {"sql": 1.0}),
    ]
    house.service.close()


def test_a_crash_gives_the_same_gateway_experts_and_distances(house: House) -> None:
    for _ in range(3):
        house.train(["w1", "w2"], "python")
        house.train(["w3"], "sql")
        fold(house.service)
    house.train(["w1"], "python")
    before, seen = gateway(house), online_gateway_of(house)
    house.same_after_a_crash("python")
    house.same_after_a_crash("sql")
    after = gateway(house)
    assert (after.version, after.digest, after.sources, after.weights) == (
        before.version,
        before.digest,
        before.sources,
        before.weights,
    )
    assert online_gateway_of(house).branch_points == seen.branch_points
    assert online_gateway_of(house).reported == seen.reported
    assert house.service.coordinator.gateway_version == house.journal.count()


def test_what_lands_while_a_merge_is_computed_lands_on_the_gateway_once_more(house: House) -> None:
    house.train(["w1"] * 3)
    interrupted_merge(house, lambda: house.train(["w1", "w2"]))
    assert gateway(house).sources == {"python": 3}
    assert house.expert().version == 6
    expected = gateway(house).adapter.flat
    for version in (3, 4):  # the seed of an update of `train` is the version it was made from
        expected = expected + make_flat(version)
    np.testing.assert_array_equal(house.expert().state.weights, expected)
    assert online_gateway_of(house).branch_points["python"].steps == 2
    house.same_after_a_crash()


@pytest.mark.parametrize("change", ["rollback", "retract"])
def test_a_merge_of_an_expert_that_was_changed_meanwhile_is_dropped_and_done_anew(house: House, change: str) -> None:
    house.train(["w1", "w2", "w1", "w1", "w1"])
    with pytest.raises(MergeOvertakenError, match="by more than updates"):
        interrupted_merge(house, lambda: house.roll_back(4) if change == "rollback" else house.retract("w2"))
    assert (online_gateway_of(house).number, gateway(house).sources) == (0, {})
    changed = house.expert().adapter
    assert fold(house.service) == 1
    assert difference(changed, gateway(house).adapter) < 1e-5
    house.same_after_a_crash()


def test_a_rollback_to_the_merged_version_and_on_is_no_obstacle(house: House) -> None:
    """The version that was merged is again what the expert is made of: nothing that was merged was taken back."""
    house.train(["w1"] * 3)

    def there_and_back() -> None:
        house.train(["w1"])
        house.roll_back(3)

    interrupted_merge(house, there_and_back)
    np.testing.assert_array_equal(house.expert().state.weights, gateway(house).adapter.flat)
    house.same_after_a_crash()


def test_an_expert_cannot_be_rolled_back_behind_a_merge_only_to_where_it_went_on(house: House) -> None:
    house.train(["w1"] * 3)
    fold(house.service)
    house.train(["w1"] * 2)
    with pytest.raises(RefusedError, match="choose version 4 or a later one") as refused:
        house.roll_back(3)
    assert refused.value.code == "folded"
    assert house.roll_back(4) == 2
    np.testing.assert_array_equal(house.expert().state.weights, gateway(house).adapter.flat)
    assert online_gateway_of(house).branch_points["python"].steps == 0
    house.same_after_a_crash()


def test_retracting_a_worker_says_what_stays_in_the_gateway(house: House) -> None:
    house.train(["w1", "w2", "w1"])
    fold(house.service)
    house.train(["w2", "w1", "w3"])
    request = RetractRequest(expert="python", worker="w2")
    result = asyncio.run(house.service.undo.retract(request))
    assert (result.removed, result.note) == (
        1,
        "What 'w2' gave before the expert was rebased as version 4 stays in the gateway.",
    )
    assert online_gateway_of(house).branch_points["python"].steps == 2
    house.same_after_a_crash()
    with pytest.raises(RefusedError, match="stays in the gateway") as refused:
        house.retract("w2")
    assert refused.value.code == "nothing_to_retract"
    assert asyncio.run(house.service.undo.retract(RetractRequest(expert="python", worker="w3"))).note == ""


def test_steps_are_counted_as_the_workers_tell_them(house: House) -> None:
    for sequence, (worker, steps) in enumerate([("w1", 2), ("w2", 700), ("w1", 2), ("w2", 1)]):
        house.push(make_body(sequence), sequence, worker, steps=steps)
    # w2 tells 700 at first, then starts anew with 1.
    assert online_gateway_of(house).branch_points["python"].steps == 2 + 700 + 0 + 1
    house.roll_back(1)
    assert online_gateway_of(house).branch_points["python"].steps == 2
    house.crash()
    assert online_gateway_of(house).branch_points["python"].steps == 2
    house.push(make_body(9), 9, "w1", steps=3)
    assert online_gateway_of(house).branch_points["python"].steps == 3


@pytest.mark.parametrize("optimizer", ["nesterov", "adam"])
def test_a_server_optimizer_begins_anew_on_the_gateway(optimizer: str) -> None:
    house = open_online(Aggregation(server_optimizer=optimizer, merge_after=3))
    house.train(["w1"] * 3)
    interrupted_merge(house, lambda: house.train(["w1"]))
    rule = house.aggregation.rule
    assert_same_state(house.expert().state, rule.update(rule.init(gateway(house).adapter.flat), make_flat(3), 1.0))
    house.same_after_a_crash()
    house.service.close()


def test_what_waits_in_a_buffer_is_not_lost_by_a_fold() -> None:
    """Of three updates two have landed and one waits; that one, and what comes meanwhile, wait again."""
    house = open_online(Aggregation(buffer_size=2, merge_after=3))
    house.train(["w1"] * 3)
    landed = house.expert().adapter
    interrupted_merge(house, lambda: house.push(make_body(50), 50))
    assert gateway_merges(house)[0].sources == {"python": 3}
    assert [e.again for e in house.journal.events("python") if isinstance(e, ExpertRebased)] == [2]
    assert difference(landed, gateway(house).adapter) < 1e-5
    rule = house.aggregation.rule
    expected = rule.init(gateway(house).adapter.flat)
    for flat in (make_flat(2), make_flat(50)):
        expected = rule.update(expected, flat, 1.0)
    assert_same_state(house.expert().state, expected)
    house.same_after_a_crash()
    house.service.close()


def test_an_expert_whose_buffer_was_never_full_has_nothing_to_fold() -> None:
    house = open_online(Aggregation(buffer_size=8, merge_after=3))
    house.train(["w1"] * 7)
    assert fold(house.service) == 0
    house.train(["w1"])
    assert fold(house.service) == 1
    assert fold(house.service) == 1
    house.service.close()


def test_without_all_input_moments_the_sum_is_taken_and_said(house: House) -> None:
    house.train(["w1"] * 3, "python")
    house.train(["w2"] * 3, "sql")
    learn(house, python=moments(1))
    first = online_gateway_of(house).adapter
    starts = {name: ExpertDelta(first, house.expert(name).adapter) for name in ("python", "sql")}
    fold(house.service)
    np.testing.assert_array_equal(
        gateway(house).adapter.flat, add_into_gateway(first, starts, several=True).adapter.flat
    )
    assert gateway(house).notes == ("without input moments of sql the deltas were added as they are, scaled",)
    assert house.service.coordinator.gateway().strategy == "living"


def test_with_all_input_moments_they_decide(house: House) -> None:
    house.train(["w1"] * 3, "python")
    house.train(["w2"] * 1, "sql")
    learn(house, python=moments(1), sql=moments(2))
    first = online_gateway_of(house).adapter
    ready = {"python": ExpertDelta(first, house.expert("python").adapter)}
    fold(house.service)
    expected = merge_with_moments(first, ready, {"python": moments(1).moments, "sql": moments(2).moments})
    np.testing.assert_array_equal(gateway(house).adapter.flat, expected.adapter.flat)
    assert gateway(house).notes == ()
