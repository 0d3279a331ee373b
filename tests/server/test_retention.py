"""Bytes of updates are bounded: what goes, what stays, and what is said before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_house import House, assert_same_state
from structlog.testing import capture_logs
from support import EagerHistory, accepted, make_body, registered

from fedmoe.federation.events import Event
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.history import History
from fedmoe.server.history.pruning import first_to_go, made_of, prune_plan
from fedmoe.server.service import CoordinatorService
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.released_bytes import ReleasedBytes, oldest_undoable, releases, stored_updates
from fedmoe.server.upkeep.retention import Retention, retention_bound

SIZE = len(make_body(1))


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobStore:
    return FolderBlobStore(tmp_path / "blobs", reserve_bytes=0)


@pytest.fixture
def house(blobs: FolderBlobStore) -> Iterator[House]:
    """A snapshot every three versions."""
    opened = House.open(blobs=blobs)
    opened.register()
    yield opened
    opened.service.close()


def retention(house: House, updates: float) -> Retention:
    """What keeps so many updates' bytes, to be asked by the test."""
    blobs, service = house.blobs, house.service
    assert isinstance(blobs, FolderBlobStore)
    return Retention(service.committer, service._history, blobs, int(updates * SIZE))


def bytes_of_updates(house: House) -> int:
    assert isinstance(house.blobs, FolderBlobStore)
    sizes = house.blobs.sizes()
    return sum(sizes.get(digest, 0) for digest in {one.digest for one in stored_updates(house.journal)})


def test_the_oldest_updates_go_and_every_version_that_is_said_to_stay_can_be_had(house: House) -> None:
    states = [house.expert()]
    for number in range(20):
        house.train([f"w{number}"])
        states.append(house.expert())
    rows, snapshots = house.journal.count(), house.journal.snapshots("python")
    with capture_logs() as lines:
        retention(house, 8.5).keep_below()
    assert bytes_of_updates(house) <= 8.5 * SIZE
    (told,) = [line for line in lines if line["event"] == "undo_ends"]
    # 90 % of the bound hold seven updates, and the first snapshot from there on is that of version 15.
    assert (told["expert"], told["version"], told["updates"]) == ("python", 15, 15)
    assert releases(house.journal) == [ReleasedBytes("python", None, 15, "keep_gb", 1000.0)]
    assert (house.journal.count(), house.journal.snapshots("python")) == (rows, snapshots)
    house.same_after_a_crash()
    history = History(house.journal, house.blobs, house.aggregation)
    for version in range(15, 20):
        assert_same_state(history.at_version(house.expert(), version).state, states[version].state)
    # Snapshots stay, so their own versions do too.
    assert_same_state(history.at_version(house.expert(), 9).state, states[9].state)


def test_what_is_gone_is_refused_and_the_advice_works(house: House) -> None:
    house.train([f"w{number}" for number in range(20)])
    retention(house, 8.5).keep_below()
    with pytest.raises(RefusedError, match="Choose version 15 or a later one") as refused:
        house.roll_back(7)
    assert refused.value.code == "history_pruned"
    with pytest.raises(RefusedError, match="no longer kept"):
        house.retract("w3")
    assert oldest_undoable(house.journal, "python") == 15
    house.roll_back(15)
    house.same_after_a_crash()


def test_the_line_comes_before_the_first_byte_goes(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.train(["w1"] * 12)
    assert isinstance(house.blobs, FolderBlobStore)
    seen: list[bool] = []
    with capture_logs() as lines:
        delete = house.blobs.delete

        def watched(*digests: str) -> None:
            seen.append(any(line["event"] == "undo_ends" for line in lines) and bool(releases(house.journal)))
            delete(*digests)

        monkeypatch.setattr(house.blobs, "delete", watched)
        retention(house, 3).keep_below()
    assert seen
    assert all(seen)


def test_below_the_bound_nothing_goes(house: House) -> None:
    house.train(["w1"] * 10)
    with capture_logs() as lines:
        retention(house, 10).keep_below()
    assert bytes_of_updates(house) == 10 * SIZE
    assert not lines


def test_without_a_snapshot_that_is_new_enough_one_is_made_first(house: House) -> None:
    house.train(["w1"] * 11)
    retention(house, 1.5).keep_below()
    assert max(house.journal.snapshots("python")) == 11
    assert bytes_of_updates(house) == 0
    house.same_after_a_crash()
    house.train(["w1"])
    house.same_after_a_crash()


def test_a_snapshot_that_cannot_be_read_is_not_relied_on(house: House) -> None:
    house.train(["w1"] * 20)
    assert isinstance(house.blobs, FolderBlobStore)
    snapshots = house.journal.snapshots("python")
    house.blobs.path(snapshots[15]).write_bytes(b"damaged")
    with capture_logs() as lines:
        retention(house, 8.5).keep_below()
    assert [line["version"] for line in lines if line["event"] == "undo_ends"] == [18]
    house.same_after_a_crash()


def test_old_updates_that_a_rollback_has_made_new_stay(house: House) -> None:
    house.train(["w1"] * 5)
    five = house.expert()
    house.train(["w2"] * 9)
    house.roll_back(5)
    house.train(["w3"] * 3)
    eighteen = house.expert()
    retention(house, 6).keep_below()
    house.same_after_a_crash()
    house.train(["w4"] * 2)
    house.roll_back(18)
    assert_same_state(house.expert().state, eighteen.state)
    assert five.version == 5


def test_the_oldest_over_all_experts_go_first(house: House) -> None:
    house.register("sql")
    house.train(["w1"] * 9)
    for number in range(9):
        house.push(make_body(300 + number), 300 + number, expert="sql")
    house.settle()
    with capture_logs() as lines:
        retention(house, 12).keep_below()
    assert {line["expert"] for line in lines if line["event"] == "undo_ends"} == {"python"}
    house.same_after_a_crash("python")
    house.same_after_a_crash("sql")


def test_bytes_that_another_expert_names_stay(house: House) -> None:
    house.register("sql")
    shared = house.push(make_body(500), 500).digest
    house.train(["w1"] * 12)
    assert house.push(make_body(500), 501, expert="sql").digest == shared
    retention(house, 3).keep_below()
    assert shared in set(house.blobs.digests())
    house.same_after_a_crash("sql")


def test_an_update_that_lands_meanwhile_keeps_bytes_that_were_old(house: House) -> None:
    house.push(make_body(700), 700)
    house.train(["w1"] * 12)
    bounded = retention(house, 3)
    remove = bounded._remove

    def late(expert: str, digests: list[str], transaction: object) -> None:
        # As if the same bytes had landed just before: the committer told so.
        bounded._arrived.add(digests[0])
        remove(expert, digests, transaction)  # type: ignore[arg-type]

    bounded._remove = late  # type: ignore[method-assign]
    before = set(house.blobs.digests())
    bounded.keep_below()
    gone = before - set(house.blobs.digests())
    assert gone
    assert len(gone) == len({one.digest for one in stored_updates(house.journal)} - set(house.blobs.digests()))


def test_a_coordinator_lets_them_go_by_itself_while_updates_land(blobs: FolderBlobStore) -> None:
    opened = House.open(blobs=blobs)
    try:
        opened.service.close()
        opened.service = _bounded(opened, 5)
        opened.register()
        with capture_logs() as lines:
            for _ in range(6):
                opened.train(["w1"] * 5)
            _settled(opened, 5)
        assert [line for line in lines if line["event"] == "undo_ends"]
        before = opened.expert()
        opened.service.close()
        opened.service = _bounded(opened, 5)
        assert_same_state(opened.expert().state, before.state)
    finally:
        opened.service.close()


def _bounded(house: House, updates: int) -> CoordinatorService:
    history = EagerHistory(house.journal, house.blobs, house.aggregation)
    service = CoordinatorService(history.recover(), house.journal, house.blobs, history, clock=lambda: 1000.0)
    assert isinstance(house.blobs, FolderBlobStore)
    service.keep_below(updates * SIZE, house.blobs)
    service.start()
    return service


def _settled(house: House, updates: int) -> None:
    deadline = time.monotonic() + 20
    while bytes_of_updates(house) > updates * SIZE:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_bound_is_half_of_what_was_free_at_first_and_stays(
    house: House, blobs: FolderBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 71_000_000_000

    monkeypatch.setattr("fedmoe.server.storage.folder_blobs.shutil.disk_usage", lambda _: Usage)
    first = retention_bound(None, house.journal, blobs)
    assert (first.most, first.gb) == (35_500_000_000, 35.5)
    monkeypatch.setattr(Usage, "free", 1_000)
    assert retention_bound(None, house.journal, blobs) == first
    assert retention_bound(2.5, house.journal, blobs).most == 2_500_000_000
    assert retention_bound(None, house.journal, blobs) == first


def test_a_state_from_before_there_was_a_bound_keeps_what_it_has(house: House, blobs: FolderBlobStore) -> None:
    house.train(["w1"] * 3)
    there = sum(blobs.sizes().values())
    most = retention_bound(None, house.journal, blobs).most
    assert most is not None
    assert most > there


def test_which_go_first() -> None:
    sizes = {"a": 10, "b": 10, "c": 10, "d": 1}
    updates = [("x", 1, "a"), ("y", 1, "b"), ("x", 2, "c"), ("x", 3, "c"), ("y", 2, "d"), ("y", 3, "gone")]
    assert first_to_go(updates, sizes, 31) == {}
    assert first_to_go(updates, sizes, 30) == {"x": 1}
    assert first_to_go(updates, sizes, 20) == {"x": 1, "y": 1}
    assert first_to_go(updates, sizes, 5) == {"x": 3, "y": 1}


def test_a_long_history_is_worked_out_in_linear_time(house: House) -> None:
    """Ten thousand versions of which half go: quadratic work would take minutes."""
    events: list[Event] = [registered(), *(accepted(version) for version in range(1, 10_001))]
    found = prune_plan(events, {5_000: "s"}, 10_000, 5_000)
    assert len(found.updates) == 5_000
    assert made_of(events, range(0, 10_001, 50), "w1") == set(range(50, 10_001, 50))
