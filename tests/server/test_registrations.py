"""How much may be registered, what it costs, and that what nobody trained changes no gateway."""

from __future__ import annotations

import asyncio
import itertools
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from expert_requests import LARGE
from live import House, open_house
from support import LAYOUT, MANIFEST, make_body, make_push

from fedmoe.coordinator import CentralCoordinator
from fedmoe.federation.aggregation import Aggregation
from fedmoe.lora.adapter import FloatMatrix, initial_adapter
from fedmoe.lora.manifest import Manifest
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.security import Principal
from fedmoe.server.registrations import RegistrationLimits
from fedmoe.server.routes.weight_responses import EncodedCache, expert_weights
from fedmoe.wire.contract.messages import ManifestMessage, RegisterRequest

JOIN = Principal("join", token="a" * 64)
_numbers = itertools.count()


def register(house: House, name: str, worker: str = "w1", by: Principal = JOIN, manifest: Manifest = MANIFEST) -> None:
    wanted = RegisterRequest(expert=name, worker=worker, manifest=ManifestMessage.of(manifest))
    asyncio.run(house.service.register(wanted, by))


def push(house: House, expert: str, seed: int) -> None:
    base = house.service.coordinator.expert(expert).version
    asyncio.run(house.service.intake.push(*make_push(make_body(seed), base, next(_numbers), expert=expert)))


def product(coordinator: CentralCoordinator) -> list[FloatMatrix]:
    adapter = coordinator.gateway().adapter
    return [np.asarray(adapter.scale * b @ a, np.float32) for _, a, b in adapter.factors()]


def test_an_expert_that_nobody_trained_takes_no_memory_also_after_a_restart(tmp_path: Path) -> None:
    with open_house(tmp_path) as house:
        register(house, "first", manifest=LARGE)
        tracemalloc.start()
        for number in range(20):
            register(house, f"x{number}", worker=f"w{number}", manifest=LARGE)
            assert house.service.coordinator.expert(f"x{number}").digest
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert taken < 4 * LARGE.layout.size * 4  # a handful of the twenty
    tracemalloc.start()
    with open_house(tmp_path) as house:
        assert len({expert.digest for expert in house.service.coordinator.experts.values()}) == 21
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        expected = initial_adapter(LARGE.layout, LARGE.alpha, 0).flat.size
        assert house.service.coordinator.expert("x3").state.weights.size == expected
    assert taken < 4 * LARGE.layout.size * 4


def test_encoded_bodies_are_kept_up_to_a_number_of_bytes_those_asked_for_last() -> None:
    coordinator = CentralCoordinator()
    experts = [coordinator.register_expert(name, MANIFEST) for name in "abcd"]
    one = EncodedCache().get(expert_weights(experts[0]), "fp32").size
    cache = EncodedCache(most_bytes=2 * one + 10)
    first = [cache.get(expert_weights(expert), "fp32") for expert in experts[:3]]
    assert cache.get(expert_weights(experts[2]), "fp32") is first[2]
    assert cache.get(expert_weights(experts[1]), "fp32") is first[1]
    cache.get(expert_weights(experts[3]), "fp32")
    assert cache.get(expert_weights(experts[1]), "fp32") is first[1]
    assert cache.get(expert_weights(experts[2]), "fp32") is not first[2]
    alone = EncodedCache(most_bytes=1)
    assert alone.get(expert_weights(experts[0]), "fp32") is alone.get(expert_weights(experts[0]), "fp32")


def test_too_large_too_many_and_too_many_of_one_are_refused_by_name_and_change_nothing_51(tmp_path: Path) -> None:
    limits = RegistrationLimits(LAYOUT.size, experts=9, untrained_by_token=6, untrained_by_worker=2)
    with open_house(tmp_path, limits=limits) as house:
        with pytest.raises(RefusedError, match="--max-parameters") as refused:
            register(house, "huge", manifest=LARGE)
        assert (refused.value.code, house.service.coordinator.manifest) == ("expert_too_large", None)
        wide = ManifestMessage.of(LARGE).model_copy(update={"rank": 1024, "modules": [("q", 1 << 24, 1 << 24)]})
        with pytest.raises(RefusedError, match=r"at most 1073741824 are taken.*--target-modules") as refused:
            asyncio.run(house.service.register(RegisterRequest(expert="huge", worker="w1", manifest=wide)))
        assert (refused.value.code, house.service.coordinator.manifest) == ("expert_too_large", None)
        register(house, "a", "w1")
        register(house, "b", "w1")
        with pytest.raises(RefusedError, match="worker 'w1' registered 2 experts") as refused:
            register(house, "c", "w1")
        assert refused.value.code == "too_many_experts"
        register(house, "a", "w1")
        for number, name in enumerate("cdef"):
            register(house, name, f"v{number}")
        with pytest.raises(RefusedError, match="6 experts were registered with this token"):
            register(house, "g", "w9")
        push(house, "a", 1)
        register(house, "g", "w9")
        register(house, "h", "w9", replace(JOIN, token="b" * 64))
        register(house, "i", "operator", Principal("admin"))
        with pytest.raises(RefusedError, match="at most 9 are kept here"):
            register(house, "j", "operator", Principal("admin"))
        assert sorted(house.service.coordinator.experts) == list("abcdefghi")
    with open_house(tmp_path, limits=limits) as house, pytest.raises(RefusedError, match="at most 9"):
        register(house, "j")


@pytest.mark.parametrize("strategy", ["weighted_average", "sum", "scaled"])
def test_an_expert_without_an_update_changes_nothing_of_the_gateway(tmp_path: Path, strategy: str) -> None:
    with open_house(tmp_path, Aggregation(strategy=strategy)) as house:
        coordinator = house.service.coordinator
        register(house, "law")
        assert not any(module.any() for module in product(coordinator))
        assert coordinator.gateway().left_out == {"law": "no update has landed on it yet"}
        push(house, "law", 1)
        before = coordinator.gateway()
        register(house, "lawexpert")
        after = coordinator.gateway()
        assert (after.digest, after.sources, after.version) == (before.digest, before.sources, before.version + 1)
        assert after.left_out == {"lawexpert": "no update has landed on it yet"}


def test_what_waits_in_a_buffer_is_no_part_of_the_gateway_yet(tmp_path: Path) -> None:
    with open_house(tmp_path, Aggregation(buffer_size=2)) as house:
        register(house, "law")
        register(house, "sql")
        for seed, name in enumerate(["law", "law", "sql"]):
            push(house, name, seed)
        gateway = house.service.coordinator.gateway()
        assert gateway.sources == {"law": 2}
        assert gateway.left_out == {"sql": "its first updates wait in the buffer"}
