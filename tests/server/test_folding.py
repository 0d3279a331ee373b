"""A gateway that lives: experts that trained enough are folded into it and go on from it, and a crash changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import numpy as np
import pytest
from crash_house import House, assert_same_state
from support import LAYOUT, MANIFEST, fold, make_body, make_flat, sha256

from fedmoe.coordinator import Aggregation, Draft, GatewayModel
from fedmoe.errors import RefusedError
from fedmoe.events import ExpertWentOn, GatewayFolded
from fedmoe.living import LivingGateway
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.algebra import product_norm, stack
from fedmoe.lora.codec import encode
from fedmoe.lora.initial import initial_adapter
from fedmoe.lora.living import Departed
from fedmoe.lora.living_sum import fold_sum
from fedmoe.storage.blobs import FolderBlobStore, MemoryBlobStore
from fedmoe.wire.messages import ManifestMessage, RegisterRequest

LIVING = Aggregation(merge_after=3)


@pytest.fixture
def house() -> Iterator[House]:
    """Folds when told to; two experts."""
    with_two = open_living()
    yield with_two
    with_two.service.close()


def open_living(aggregation: Aggregation = LIVING, **options: object) -> House:
    opened = House.open(aggregation, folds_by_itself=False, **options)  # type: ignore[arg-type]
    opened.register("python")
    opened.register("sql")
    return opened


def living(house: House) -> LivingGateway:
    found = house.service.coordinator.draft().living
    assert found is not None
    return found


def gateway(house: House) -> GatewayModel:
    return house.service.gateway()


def folds(house: House) -> list[GatewayFolded]:
    return [event for event in house.journal.events() if isinstance(event, GatewayFolded)]


def difference(left: Adapter, right: Adapter) -> float:
    """The norm of the difference of two products, relative to the left one's."""
    return product_norm(stack([(1.0, left), (-1.0, right)])) / product_norm(left)


def test_all_experts_start_from_one_first_gateway_that_does_nothing(house: House) -> None:
    np.testing.assert_array_equal(house.expert("python").state.weights, house.expert("sql").state.weights)
    assert gateway(house).sources == {}
    assert product_norm(gateway(house).adapter) == 0


def test_one_expert_alone_is_the_gateway_and_goes_on_from_itself() -> None:
    house = House.open(LIVING, folds_by_itself=False)
    house.register()
    house.train(["w1"] * 3)
    trained = house.expert().adapter
    assert fold(house.service) == 1
    assert difference(trained, gateway(house).adapter) < 1e-5
    assert house.expert().version == 4
    np.testing.assert_array_equal(house.expert().state.weights, gateway(house).adapter.flat)
    house.service.close()


def test_who_is_ready_is_folded_and_nobody_waits(house: House) -> None:
    house.train(["w1"] * 3, "python")
    house.train(["w2"] * 2, "sql")
    before = house.expert("sql").state
    assert fold(house.service) == 1
    assert house.expert("sql").state is before
    assert gateway(house).sources == {"python": 3}
    house.train(["w2"], "sql")
    assert fold(house.service) == 2
    assert [event.staleness for event in folds(house)] == [{"python": 0}, {"sql": 1}]
    assert folds(house)[1].weights == {"sql": pytest.approx(2**-0.5)}
    assert gateway(house).sources == {"python": 3, "sql": 3}
    np.testing.assert_array_equal(house.expert("sql").state.weights, gateway(house).adapter.flat)


def test_a_crash_gives_the_same_gateway_experts_and_distances(house: House) -> None:
    for _ in range(3):
        house.train(["w1", "w2"], "python")
        house.train(["w3"], "sql")
        fold(house.service)
    house.train(["w1"], "python")
    before, seen = gateway(house), living(house)
    house.same_after_a_crash("python")
    house.same_after_a_crash("sql")
    after = gateway(house)
    assert (after.version, after.digest, after.sources, after.weights) == (
        before.version,
        before.digest,
        before.sources,
        before.weights,
    )
    assert living(house).departures == seen.departures
    assert living(house).told == seen.told
    assert house.service.coordinator.gateway_version == house.journal.count()
