from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support import LAYOUT, MANIFEST, make_body, make_flat, make_push, open_service

from fedmoe.coordinator import Aggregation, GatewayModel
from fedmoe.errors import RefusedError
from fedmoe.events import Event, ExpertRegistered, UpdateAccepted
from fedmoe.experts import ExpertModel
from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.codec import encode
from fedmoe.lora.update_rules import RULES, RuleState
from fedmoe.server.history import History, read_snapshot, snapshot_bytes
from fedmoe.server.service import CoordinatorService
from fedmoe.storage.blobs import (
    BlobStore,
    CorruptBlobError,
    FolderBlobStore,
    MemoryBlobStore,
    MissingBlobError,
    StorageFailedError,
    put,
)
from fedmoe.storage.journal import Journal, SqlJournal
from fedmoe.wire.messages import ManifestMessage, RegisterRequest, RetractRequest, RollbackRequest, UpdateResult


@dataclass
class House:
    """A service on one journal and one blob store, that can be crashed and opened again."""

    journal: Journal
    blobs: BlobStore
    aggregation: Aggregation
    keep_updates: int | None
    service: CoordinatorService

    @classmethod
    def open(
        cls, aggregation: Aggregation | None = None, keep_updates: int | None = None, blobs: BlobStore | None = None
    ) -> House:
        journal, store, chosen = SqlJournal(None), blobs or MemoryBlobStore(), aggregation or Aggregation()
        return cls(journal, store, chosen, keep_updates, open_service(journal, store, chosen, keep_updates))

    def crash(self) -> None:
        """Drop everything that is in memory and recover."""
        self.service.close()
        self.service = open_service(self.journal, self.blobs, self.aggregation, self.keep_updates)

    def register(self, name: str = "python", seed: int | None = None) -> None:
        request = RegisterRequest(expert=name, worker="w1", manifest=ManifestMessage.of(MANIFEST), seed=seed)
        asyncio.run(self.service.register(request))

    def push(
        self, data: bytes, sequence: int, worker: str = "w1", expert: str = "python", behind: int = 0
    ) -> UpdateResult:
        base = max(0, self.service.coordinator.expert(expert).version - behind)
        return asyncio.run(self.service.push(*make_push(data, base, sequence, worker, expert)))

    def train(self, workers: Sequence[str], expert: str = "python") -> None:
        """One update from each worker named, with content that follows from the version it is made from."""
        for worker in workers:
            self.push(make_body(self.expert(expert).version), self.journal.count(), worker, expert)
        self.settle()

    def settle(self) -> None:
        """Wait until snapshots and pruning, which follow an answer, are done."""
        self.service._committer.submit(lambda draft: None).result(10)

    def roll_back(self, to_version: int, expert: str = "python") -> int:
        return asyncio.run(self.service.roll_back(RollbackRequest(expert=expert, to_version=to_version))).removed

    def retract(self, worker: str, expert: str = "python") -> int:
        return asyncio.run(self.service.retract(RetractRequest(expert=expert, worker=worker))).removed

    def expert(self, name: str = "python") -> ExpertModel:
        return self.service.coordinator.expert(name)

    def same_after_a_crash(self, name: str = "python") -> None:
        before = self.expert(name)
        self.crash()
        assert_same_state(self.expert(name).state, before.state)
        assert self.expert(name).version == before.version


def assert_same_state(one: RuleState, other: RuleState) -> None:
    np.testing.assert_array_equal(one.weights, other.weights)
    assert len(one.moments) == len(other.moments)
    for mine, theirs in zip(one.moments, other.moments, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert one.count == other.count


@pytest.fixture(params=["sgd", "nesterov", "adam"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    opened = House.open(Aggregation(0.5, server_optimizer=request.param))
    opened.register()
    yield opened
    opened.service.close()


@pytest.fixture
def pruned() -> Iterator[House]:
    """Keeps what the last four changes need; a snapshot every three versions."""
    opened = House.open(keep_updates=4)
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


def test_recovery_folds_only_what_follows_the_newest_snapshot(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.train(["w1"] * 8)
    read: list[str] = []
    original = house.blobs.read
    monkeypatch.setattr(house.blobs, "read", lambda digest: read.append(digest) or original(digest))
    house.same_after_a_crash()
    assert len(read) == 3  # the snapshot of version 6, updates 7 and 8


def test_a_lost_or_damaged_snapshot_is_folded_again_from_the_updates(house: House) -> None:
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


def test_recovery_removes_blobs_the_journal_does_not_name(house: House) -> None:
    house.train(["w1"] * 4)
    named = set(house.blobs.digests())
    put(house.blobs, b"stored, but the process died before the journal was written")
    house.crash()
    assert set(house.blobs.digests()) == named


def test_blobs_without_any_journal_are_not_swept_away() -> None:
    """A lost journal.sqlite must not cost the updates as well."""
    blobs = MemoryBlobStore()
    put(blobs, b"an update")
    with pytest.raises(StorageFailedError, match=r"journal was lost.*Restore journal.sqlite"):
        open_service(SqlJournal(None), blobs)
    assert len(list(blobs.digests())) == 1


def test_a_missing_update_stops_the_recovery(house: House) -> None:
    result = house.push(make_body(1), 1)
    house.blobs.delete(result.digest)
    house.service.close()
    with pytest.raises(MissingBlobError, match=result.digest):
        open_service(house.journal, house.blobs, house.aggregation)


def test_a_damaged_update_stops_the_recovery(tmp_path: Path) -> None:
    blobs = FolderBlobStore(tmp_path, 0)
    house = House.open(blobs=blobs)
    house.register()
    result = house.push(make_body(1), 1)
    house.service.close()
    blobs.path(result.digest).write_bytes(make_body(2))
    with pytest.raises(CorruptBlobError, match=result.digest):
        open_service(house.journal, blobs)


def test_another_server_optimizer_is_refused_naming_the_one_kept(house: House) -> None:
    other = Aggregation(server_optimizer="sgd" if house.aggregation.server_optimizer != "sgd" else "adam")
    with pytest.raises(RefusedError, match=f"--server-optimizer {house.aggregation.server_optimizer}") as refused:
        History(house.journal, house.blobs, other).recover()
    assert refused.value.code == "rule_mismatch"


def test_another_learning_rate_changes_the_future_and_not_the_past(house: House) -> None:
    house.train(["w1"] * 4)
    before = house.expert()
    house.aggregation = Aggregation(0.125, server_optimizer=house.aggregation.server_optimizer)
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
    for gateway in gateways[:-1]:
        experts = {}
        for name, version in gateway.sources.items():
            now = house.expert(name)
            state = history.at_version(now, version).state if version < now.version else now.state
            experts[name] = ExpertModel(name, MANIFEST, version, state)
        again = GatewayModel.build(gateway.version, experts, house.aggregation)
        assert (again.digest, dict(again.sources)) == (gateway.digest, dict(gateway.sources))


# Keeping only the last updates.


def test_pruning_drops_what_undoing_the_last_changes_does_not_need(pruned: House) -> None:
    pruned.train(["w1"] * 30)
    # Versions 26 to 30 start from the snapshot of version 24.
    assert sorted(pruned.journal.snapshots("python")) == [24, 27, 30]
    assert len(list(pruned.blobs.digests())) == 3 + 6
    pruned.same_after_a_crash()


@pytest.mark.parametrize("updates", range(13, 20))
def test_the_last_changes_can_be_undone_and_earlier_ones_are_refused(pruned: House, updates: int) -> None:
    states = [pruned.expert().state]
    for number in range(updates):
        pruned.train([f"w{number}"])
        states.append(pruned.expert().state)
    pruned.crash()
    history = History(pruned.journal, pruned.blobs, pruned.aggregation, 4)
    for version in range(updates - 4, updates):
        assert_same_state(history.at_version(pruned.expert(), version).state, states[version])
        assert history.without_worker(pruned.expert(), f"w{version}").removed == 1
    with pytest.raises(RefusedError, match="Only the last 4 updates can be undone") as refused:
        pruned.roll_back(1)
    assert refused.value.code == "history_pruned"
    with pytest.raises(RefusedError, match="no longer kept"):
        pruned.retract("w1")
    assert pruned.expert().version == updates


def test_a_rollback_does_not_cost_the_undoing_of_what_follows(pruned: House) -> None:
    """After a rollback the newest versions are made of old updates; those are then needed longer."""
    pruned.train(["w1"] * 8)
    pruned.roll_back(5)
    five = pruned.expert().state
    pruned.train(["w2"])
    ten = pruned.expert().state
    pruned.train(["w3", "w3"])
    assert pruned.roll_back(10) == 2
    assert_same_state(pruned.expert().state, ten)
    assert pruned.roll_back(9) == 1
    assert_same_state(pruned.expert().state, five)
    pruned.same_after_a_crash()


def test_a_blob_that_another_expert_uses_is_not_pruned(pruned: House) -> None:
    """The same bytes for two experts are one blob."""
    pruned.register("sql")
    shared = pruned.push(make_body(500), 500, expert="sql").digest
    assert pruned.push(make_body(500), 501).digest == shared
    pruned.train(["w1"] * 20)
    pruned.same_after_a_crash("sql")


def test_equal_snapshots_of_two_versions_are_not_pruned_with_the_first(pruned: House) -> None:
    pruned.train(["w1"] * 6)
    pruned.roll_back(3)
    pruned.train(["w1", "w1"])
    assert pruned.roll_back(3) == 2  # the snapshot due now has the bytes of version 3's
    for _ in range(4):
        pruned.train(["w1"] * 3)
        pruned.same_after_a_crash()


def test_a_pruned_update_sent_again_is_a_duplicate(pruned: House) -> None:
    first = pruned.push(make_body(77), 77)
    pruned.train(["w1"] * 20)
    assert first.digest not in set(pruned.blobs.digests())
    again = pruned.push(make_body(77), 77)
    assert (again.version, again.duplicate) == (1, True)
    pruned.same_after_a_crash()


def test_a_crash_while_pruning_is_repaired_by_the_next_start(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House.open(keep_updates=4)
    house.register()
    house.train(["w1"] * 11)

    def die(digest: str) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(house.blobs, "delete", die)
        house.train(["w1"])  # the snapshot of version 12 prunes
    assert sorted(house.journal.snapshots("python")) == [6, 9, 12]
    orphans = len(list(house.blobs.digests()))
    house.same_after_a_crash()
    assert len(list(house.blobs.digests())) == orphans - 1  # version 3's snapshot; updates go with the next pruning
    house.train(["w1"] * 18)
    assert len(list(house.blobs.digests())) == 3 + 6
    house.service.close()


def test_flat_vectors_are_what_a_journal_folds(house: House) -> None:
    """The naive fold: initial weights, then every update of the journal in order, gives the expert's very bits."""
    house.train(["w1", "w2", "w1", "w1"])
    assert_same_state(house.expert().state, fold(house.journal, house.blobs, house.aggregation))


def fold(journal: Journal, blobs: BlobStore, aggregation: Aggregation) -> RuleState:
    from fedmoe.lora.codec import decode

    state = ExpertModel.initial("python", MANIFEST, _seed(journal), aggregation.rule).state
    events: list[Event] = list(journal.events("python"))
    for event in events[1:]:
        assert isinstance(event, UpdateAccepted)
        delta: FloatVector = decode(blobs.read(event.digest), LAYOUT).flat
        state = aggregation.rule.update(state, delta, event.coefficient)
    return state
