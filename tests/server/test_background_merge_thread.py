"""Around merges: what is kept, what is refused, when a federation goes online, and the thread that merges."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Literal, NoReturn

import numpy as np
import pytest
from crash_house import House
from online_house import ONLINE, difference, gateway, gateway_merges, online_gateway_of, open_online
from support import LAYOUT, MANIFEST, fold, make_flat, open_service

from fedmoe.coordinator import Aggregation
from fedmoe.federation.online_gateway import MergePlan
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.algebra import TruncatedAdapter
from fedmoe.lora.codec import encode
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blobs import disk_full, put
from fedmoe.server.upkeep.background_merge import IDLE_SECONDS, MergeFailedError
from fedmoe.wire.contract.messages import ManifestMessage, RegisterRequest


@pytest.fixture
def house() -> Iterator[House]:
    """Folds when told to; two experts."""
    with_two = open_online()
    yield with_two
    with_two.service.close()


def test_an_expert_that_comes_later_starts_from_the_gateway(house: House) -> None:
    house.train(["w1"] * 3)
    fold(house.service)
    house.register("docs")
    late = house.expert("docs")
    assert late.version == 1
    np.testing.assert_array_equal(late.state.weights, gateway(house).adapter.flat)
    assert online_gateway_of(house).branch_points["docs"].gateway == 1
    house.same_after_a_crash("docs")
    house.train(["w5"] * 3, "docs")
    assert fold(house.service) == 2
    assert gateway_merges(house)[-1].staleness == {"docs": 0}
    with pytest.raises(RefusedError, match="choose version"):
        house.roll_back(0, "docs")


def test_gateways_that_nobody_goes_on_from_are_pruned_if_the_past_is() -> None:
    house = open_online(keep_updates=4)
    house.train(["w1"] * 3, "sql")
    fold(house.service)
    for _ in range(3):
        house.train(["w1"] * 3, "python")
        fold(house.service)
    house.settle()
    kept = [event.number for event in gateway_merges(house) if event.digest in set(house.blobs.digests())]
    assert kept == [1, 4]  # sql left after fold 1
    house.same_after_a_crash("python")
    house.same_after_a_crash("sql")
    house.service.close()


def test_all_gateways_are_kept_if_all_of_the_past_is(house: House) -> None:
    for _ in range(3):
        house.train(["w1"] * 3)
        fold(house.service)
    house.crash()
    assert {event.digest for event in gateway_merges(house)} <= set(house.blobs.digests())


def test_a_seed_of_its_own_is_refused_where_experts_start_from_the_gateway(house: House) -> None:
    with pytest.raises(RefusedError, match="Register it without a seed") as refused:
        house.register("docs", seed=5)
    assert refused.value.code == "start_mismatch"


@pytest.mark.parametrize(("wanted", "aggregation"), [("gateway", Aggregation()), ("initial", ONLINE)])
def test_a_worker_that_counts_on_another_start_is_refused(
    wanted: Literal["gateway", "initial"], aggregation: Aggregation
) -> None:
    house = House.open(aggregation)
    request = RegisterRequest(expert="python", worker="w1", manifest=ManifestMessage.of(MANIFEST), start_from=wanted)
    with pytest.raises(RefusedError, match=f"the worker asks for: {wanted}") as refused:
        asyncio.run(house.service.register(request))
    assert refused.value.code == "start_mismatch"
    assert house.journal.count() == 0
    house.service.close()


def test_experts_that_went_on_cannot_be_merged_as_if_they_had_not(house: House) -> None:
    house.train(["w1"] * 3)
    fold(house.service)
    house.aggregation = Aggregation()
    house.service.close()
    with pytest.raises(RefusedError, match="Start with --start-from gateway"):
        house.crash()


def test_a_federation_can_begin_to_live_later() -> None:
    """Experts with first weights of their own are merged whole, as what they learned since a gateway of nothing."""
    house = House.open(Aggregation(), merges_by_itself=False)
    house.register("python")
    house.register("sql")
    house.train(["w1"] * 5)
    trained = house.expert().adapter
    house.aggregation = ONLINE
    house.crash()
    assert gateway(house).version == 7
    assert online_gateway_of(house).branch_points["python"].steps == 5
    assert fold(house.service) == 1
    assert difference(trained, gateway(house).adapter) < 1e-5
    assert gateway(house).version == 8
    house.same_after_a_crash()
    house.service.close()


def test_a_coordinator_merges_by_itself_as_soon_as_somebody_is_ready() -> None:
    house = House.open(ONLINE)
    house.register()
    house.train(["w1"] * 3)
    deadline = time.monotonic() + 20
    while not gateway_merges(house) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [event.sources for event in gateway_merges(house)] == [{"python": 3}]
    house.crash()
    assert gateway(house).version == gateway_merges(house)[0].version
    house.service.close()


def test_the_last_steps_of_an_expert_are_merged_once_it_rests(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.train(["w1"] * 2)
    trained = house.expert().adapter
    assert fold(house.service) == 0
    ended = house.service.committer.clock()
    monkeypatch.setattr(house.service.committer, "clock", lambda: ended + IDLE_SECONDS)
    assert fold(house.service) == 1
    assert gateway_merges(house)[0].sources == {"python": 2}
    assert difference(trained, gateway(house).adapter) < 1e-5
    assert fold(house.service) == 1  # nothing is left
    house.same_after_a_crash()


def test_nobody_is_at_rest_because_the_coordinator_was_away(house: House) -> None:
    house.train(["w1"] * 2)
    house.service.close()
    now = house.service.committer.clock() + 10 * IDLE_SECONDS
    house.service = open_service(
        house.journal, house.blobs, house.aggregation, house.keep_updates, merges_by_itself=False, clock=lambda: now
    )
    assert fold(house.service) == 0
    now += IDLE_SECONDS
    assert fold(house.service) == 1


def test_what_was_ready_before_a_restart_is_merged_after_it(house: House) -> None:
    house.train(["w1"] * 3)
    house.merges_by_itself = True
    house.crash()
    deadline = time.monotonic() + 20
    while not gateway_merges(house) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [event.number for event in gateway_merges(house)] == [1]


def test_a_gateway_that_was_stored_but_never_decided_troubles_no_later_one(house: House) -> None:
    house.train(["w1"] * 3)
    orphan = put(house.blobs, encode(LAYOUT, make_flat(77)))
    house.crash()
    fold(house.service)
    house.crash()
    assert {gateway_merges(house)[0].digest, orphan} <= set(house.blobs.digests())


def test_a_full_disk_puts_a_merge_off(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.train(["w1"] * 3)

    def full() -> NoReturn:
        raise disk_full("here")

    with monkeypatch.context() as patched:
        patched.setattr(house.blobs, "writer", full)
        with pytest.raises(RefusedError, match="no space left"):
            fold(house.service)
    assert fold(house.service) == 1


def test_a_merge_that_cannot_be_computed_changes_nothing_and_is_tried_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.train(["w1"] * 3)
    broken = TruncatedAdapter(Adapter(LAYOUT, MANIFEST.alpha, np.full(LAYOUT.size, np.nan, np.float32)), 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(MergePlan, "compute", lambda plan, starts: broken)
        with pytest.raises(MergeFailedError, match="is not finite"):
            fold(house.service)
    assert (online_gateway_of(house).number, house.expert().version) == (0, 3)
    assert fold(house.service) == 1
