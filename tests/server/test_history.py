from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from crash_house import House, assert_same_state
from memory_blobs import MemoryBlobStore
from support import LAYOUT, MANIFEST, make_body, make_flat, open_service

from fedmoe.coordinator import Aggregation, GatewayModel
from fedmoe.experts import ExpertModel
from fedmoe.federation.events import Event, ExpertRegistered, UpdateAccepted
from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.codec import decode, encode
from fedmoe.lora.update_rules import RULES, RuleState
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.history import History
from fedmoe.server.history.replay import DamagedUpdateError, read_snapshot, snapshot_bytes
from fedmoe.server.storage.blobs import BlobStore, put
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.journal import Journal


@pytest.fixture(
    params=[("sgd", 1), ("nesterov", 1), ("adam", 1), ("nesterov", 2)], ids=lambda param: f"{param[0]}-{param[1]}"
)
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    optimizer, buffer_size = request.param
    opened = House.open(Aggregation(0.5, server_optimizer=optimizer, buffer_size=buffer_size))
    opened.register()
    yield opened
    opened.service.close()


# Snapshots.


@pytest.mark.parametrize("rule", sorted(RULES))
def test_a_snapshot_gives_the_state_back_bit_for_bit(rule: str) -> None:
    state = RULES[rule].init(make_flat(1))
    for seed in range(3):
        state = RULES[rule].update(state, make_flat(seed), 0.3)
    assert_same_state(read_snapshot(snapshot_bytes(state), 3), state)


def test_snapshots_are_taken_every_so_many_versions(house: House) -> None:
    house.train(["w1"] * 10)
    assert sorted(house.journal.snapshots("python")) == [3, 6, 9]


def test_recovery_merges_only_what_follows_the_newest_snapshot(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.train(["w1"] * 8)
    read: list[str] = []
    original = house.blobs.read

    def noted(digest: str) -> bytes:
        read.append(digest)
        return original(digest)

    monkeypatch.setattr(house.blobs, "read", noted)
    house.same_after_a_crash()
    assert len(read) == 3  # the snapshot of version 6, updates 7 and 8


def test_a_lost_or_damaged_snapshot_is_merged_again_from_the_updates(house: House) -> None:
    house.train(["w1"] * 8)
    before = house.expert()
    snapshots = house.journal.snapshots("python")
    assert isinstance(house.blobs, MemoryBlobStore)
    house.blobs.delete(snapshots[6])
    house.crash()
    assert_same_state(house.expert().state, before.state)
    house.blobs._blobs[snapshots[3]] = b"damaged"
    house.crash()
    assert_same_state(house.expert().state, before.state)


# Recovery.


def test_a_restart_gives_everything_back(house: House) -> None:
    house.register("sql", seed=7)
    house.train(["w1", "w2", "w1", "w3"])
    house.train(["w2"] * 5, "sql")
    house.roll_back(2)
    version, roster = house.service.coordinator.gateway_version, house.service.roster.workers("python", 2000.0)
    gateway = house.service.coordinator.gateway()
    house.same_after_a_crash("python")
    house.same_after_a_crash("sql")
    assert house.service.coordinator.gateway_version == version == house.journal.count()
    assert house.service.coordinator.gateway().digest == gateway.digest
    assert house.service.roster.workers("python", 2000.0) == roster


def test_recovery_keeps_blobs_the_journal_does_not_name_and_moves_them_out_of_the_way_after_a_day_2(
    tmp_path: Path,
) -> None:
    blobs = FolderBlobStore(tmp_path, 0)
    house = House.open(blobs=blobs)
    house.register()
    house.train(["w1"] * 4)
    named = set(blobs.digests())
    orphan = put(blobs, b"stored, but the process died before the journal was written")
    house.crash()
    assert set(blobs.digests()) == named | {orphan}
    a_day_before = time.time() - 86_401
    for digest in blobs.digests():
        os.utime(blobs.path(digest), (a_day_before, a_day_before))
    house.crash()
    assert set(blobs.digests()) == named
    assert [path.name for path in (tmp_path / "trash").rglob("*") if path.is_file()] == [orphan]
    house.service.close()


def test_a_missing_update_stops_the_recovery(house: House) -> None:
    result = house.push(make_body(1), 1)
    house.blobs.delete(result.digest)
    house.service.close()
    with pytest.raises(DamagedUpdateError, match=rf"version 1 of python.*{result.digest}.*--skip-damaged"):
        open_service(house.journal, house.blobs, house.aggregation)


def test_a_damaged_update_stops_the_recovery(tmp_path: Path) -> None:
    blobs = FolderBlobStore(tmp_path, 0)
    house = House.open(blobs=blobs)
    house.register()
    result = house.push(make_body(1), 1)
    house.service.close()
    blobs.path(result.digest).write_bytes(make_body(2))
    with pytest.raises(DamagedUpdateError, match=rf"version 1 of python.*{result.digest}.*--skip-damaged"):
        open_service(house.journal, blobs)


def test_another_server_optimizer_is_refused_naming_the_one_kept(house: House) -> None:
    other = Aggregation(server_optimizer="sgd" if house.aggregation.server_optimizer != "sgd" else "adam")
    with pytest.raises(RefusedError, match=f"--server-optimizer {house.aggregation.server_optimizer}") as refused:
        History(house.journal, house.blobs, other).recover()
    assert refused.value.code == "rule_mismatch"


def test_another_learning_rate_changes_the_future_and_not_the_past(house: House) -> None:
    house.train(["w1"] * 4)
    before = house.expert()
    house.aggregation = replace(house.aggregation, server_learning_rate=0.125)
    house.crash()
    assert_same_state(house.expert().state, before.state)
    assert house.push(make_body(9), 9).coefficient == 0.125


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_an_update_lands_and_is_replayed_as_it_was_sent(house: House, dtype: str) -> None:
    for seed in range(4):
        house.push(encode(LAYOUT, make_flat(seed), dtype), seed)  # type: ignore[arg-type]
    house.same_after_a_crash()


# Rollback.


def test_a_rollback_has_the_earlier_versions_bits(house: House) -> None:
    states = [house.expert().state]
    for worker in ("w1", "w2", "w1", "w2", "w1"):
        house.train([worker])
        states.append(house.expert().state)
    for to_version, removed in ((4, 1), (1, 3), (0, 1), (5, 0)):
        assert house.roll_back(to_version) == removed
        assert_same_state(house.expert().state, states[to_version])
    assert house.expert().version == 9
    house.same_after_a_crash()


def test_updates_after_a_rollback_build_on_it(house: House) -> None:
    house.train(["w1"] * 3)
    house.roll_back(1)
    kept = house.expert().state
    result = house.push(make_body(50), 50)
    assert (result.version, result.staleness) == (5, 0)
    expected = house.aggregation.rule.update(kept, make_flat(50), 0.5)
    assert_same_state(house.expert().state, expected)
    house.same_after_a_crash()


@pytest.mark.parametrize("version", [3, 4, 99])
def test_only_an_earlier_version_can_be_rolled_back_to(house: House, version: int) -> None:
    house.train(["w1"] * 3)
    with pytest.raises(RefusedError, match="Choose a version from 0 to 2") as refused:
        house.roll_back(version)
    assert refused.value.code == "unknown_version"
    assert house.expert().version == 3


# Retraction.


def without(house: House, workers: Sequence[str], worker: str) -> RuleState:
    """The state of a federation to which `worker` never contributed, with the coefficients there were."""
    state = ExpertModel.initial("python", MANIFEST, _seed(house.journal), house.aggregation.rule).state
    updates = [event for event in house.journal.events("python") if isinstance(event, UpdateAccepted)]
    for number, (author, update) in enumerate(zip(workers, updates, strict=True)):
        if author != worker:
            state = house.aggregation.rule.update(state, make_flat(number), update.coefficient)
    return state


def _seed(journal: Journal) -> int:
    first = next(iter(journal.events("python")))
    assert isinstance(first, ExpertRegistered)
    return first.seed


@pytest.mark.parametrize(
    "workers", [["w2"], ["w2", "w1"], ["w1", "w2"], ["w1", "w2", "w3", "w2", "w1", "w3", "w2", "w1"]]
)
def test_a_retraction_equals_a_history_without_the_worker(house: House, workers: list[str]) -> None:
    house.train(workers)
    expected = without(house, workers, "w2")
    assert house.retract("w2") == workers.count("w2")
    assert_same_state(house.expert().state, expected)
    assert house.expert().version == len(workers) + 1
    house.same_after_a_crash()


def test_a_retraction_can_be_undone(house: House) -> None:
    house.train(["w1", "w2", "w1"])
    whole = house.expert().state
    house.retract("w2")
    assert house.roll_back(3) == 0
    assert_same_state(house.expert().state, whole)


def test_a_worker_without_updates_in_this_version_cannot_be_retracted(house: House) -> None:
    house.train(["w1", "w2"])
    house.retract("w2")
    for worker in ("w2", "nobody"):
        with pytest.raises(RefusedError, match=f"version 3 of python holds no update of worker '{worker}'") as refused:
            house.retract(worker)
        assert refused.value.code == "nothing_to_retract"


def test_a_retracted_update_is_still_answered_as_a_duplicate(house: House) -> None:
    first = house.push(make_body(1), 1)
    house.retract("w1")
    again = house.push(make_body(1), 1)
    assert (again.version, again.duplicate) == (first.version, True)
    assert house.expert().version == 2


# The gateway of any moment.


def test_a_gateway_is_reproducible_by_hash_from_names_and_versions(house: House) -> None:
    house.register("sql")
    gateways: list[GatewayModel] = []
    for name in ("python", "sql", "python", "python", "sql"):
        house.train(["w1"], name)
        gateways.append(house.service.coordinator.gateway())
    house.crash()
    history = History(house.journal, house.blobs, house.aggregation)
    for gateway in filter(lambda one: one.sources, gateways[:-1]):
        experts = {}
        for name, version in gateway.sources.items():
            now = house.expert(name)
            state = history.at_version(now, version).state if version < now.version else now.state
            experts[name] = ExpertModel(name, MANIFEST, version, state)
        again = GatewayModel.build(gateway.version, experts, house.aggregation)
        assert (again.digest, dict(again.sources)) == (gateway.digest, dict(gateway.sources))


def test_flat_vectors_are_what_a_journal_merges(house: House) -> None:
    """The naive fold: initial weights, then every update of the journal in order, gives the expert's very bits."""
    house.train(["w1", "w2", "w1", "w1"])
    assert_same_state(house.expert().state, fold(house.journal, house.blobs, house.aggregation))


def fold(journal: Journal, blobs: BlobStore, aggregation: Aggregation) -> RuleState:
    state = ExpertModel.initial("python", MANIFEST, _seed(journal), aggregation.rule).state
    events: list[Event] = list(journal.events("python"))
    for event in events[1:]:
        assert isinstance(event, UpdateAccepted)
        delta: FloatVector = decode(blobs.read(event.digest), LAYOUT).flat
        state = aggregation.rule.update(state, delta, event.coefficient)
    return state
