"""One damaged blob costs its version, by a decision that is journalled; what is rebuilt is held against its digest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_house import House, assert_same_state
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_blobs import MemoryBlobStore
from support import EagerHistory, make_body

from fedmoe.coordinator import Aggregation, CentralCoordinator
from fedmoe.federation.events import UpdateAccepted, UpdateLost
from fedmoe.lora.codec import decode
from fedmoe.server.history.replay import DamagedUpdateError, with_progress
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.sqlite_journal import SqliteJournal


@pytest.fixture(params=["sgd", "nesterov"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    opened = House.open(Aggregation(0.5, server_optimizer=request.param))
    opened.register()
    yield opened
    opened.service.close()


def recover(house: House, skip_damaged: bool = False) -> CentralCoordinator:
    return EagerHistory(house.journal, house.blobs, house.aggregation, skip_damaged=skip_damaged).recover()


def damage(house: House, digest: str) -> None:
    assert isinstance(house.blobs, MemoryBlobStore)
    house.blobs._blobs[digest] = b"damaged"


def without_snapshots(house: House) -> None:
    for version in house.journal.snapshots("python"):
        house.journal.drop_snapshot("python", version)


@pytest.mark.parametrize("how", ["damaged", "missing"])
def test_a_damaged_update_costs_its_version_only_when_told_and_then_for_ever(house: House, how: str) -> None:
    """Fault 74."""
    house.train(["w1", "w2", "w1", "w3", "w2"])
    house.service.close()
    without_snapshots(house)
    lost = next(e for e in house.journal.events() if isinstance(e, UpdateAccepted) and e.version == 3)
    damage(house, lost.digest) if how == "damaged" else house.blobs.delete(lost.digest)
    count = house.journal.count()
    with pytest.raises(DamagedUpdateError, match=rf"version 3 of python .*{lost.digest}.*--skip-damaged"):
        recover(house)
    assert house.journal.count() == count
    expert = recover(house, skip_damaged=True).expert("python")
    assert (expert.version, house.journal.count()) == (6, count + 1)
    (event,) = [e for e in house.journal.events() if isinstance(e, UpdateLost)]
    assert (event.made, event.version, event.digest) == (3, 6, lost.digest)
    assert house.journal.version_digest("python", 6) == expert.digest
    rule = house.aggregation.rule
    again = recover(house).expert("python")  # without the flag: it is decided
    assert_same_state(again.state, expert.state)
    updates = [e for e in house.journal.events() if isinstance(e, UpdateAccepted) and e.version != 3]
    house.crash()
    folded = house.service._history._beginning(next(iter(house.journal.events())), None)  # type: ignore[arg-type]
    for update in updates:
        body = house.blobs.read(update.digest)
        folded = rule.update(folded, decode(body, again.manifest.layout).flat, update.coefficient)
    assert_same_state(house.expert().state, folded)


def test_several_damaged_updates_are_left_out_one_by_one_and_the_expert_trains_on(house: House) -> None:
    house.register("sql", seed=7)
    house.train(["w1"] * 5)
    house.train(["w2"] * 3, "sql")
    before = house.expert("sql")
    house.service.close()
    without_snapshots(house)
    for update in [e for e in house.journal.events("python") if isinstance(e, UpdateAccepted)][1:4:2]:
        damage(house, update.digest)
    coordinator = recover(house, skip_damaged=True)
    assert coordinator.expert("python").version == 7
    assert coordinator.gateway_version == house.journal.count()
    assert_same_state(coordinator.expert("sql").state, before.state)
    house.crash()
    assert house.push(make_body(99), 99).version == 8
    house.same_after_a_crash()


def test_the_option_does_nothing_where_nothing_is_damaged(house: House) -> None:
    house.train(["w1"] * 4)
    count = house.journal.count()
    recover(house, skip_damaged=True)
    assert house.journal.count() == count


def test_damage_behind_a_snapshot_is_not_met_by_a_start(house: House) -> None:
    house.train(["w1"] * 8)
    first = next(e for e in house.journal.events() if isinstance(e, UpdateAccepted))
    damage(house, first.digest)
    house.same_after_a_crash()


def test_what_is_rebuilt_otherwise_than_journalled_is_refused(tmp_path: Path) -> None:
    """The blobs are whole and the chain holds; only the digest of the version tells."""
    house = House.open()
    house.register()
    house.train(["w1"] * 2)
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    events, digests = list(house.journal.events()), [None, house.journal.version_digest("python", 1), "f" * 64]
    journal.append(events, digests)
    journal.close()
    with pytest.raises(StorageFailedError, match=rf"version 2 of python was rebuilt.*{'f' * 64}"):
        EagerHistory(SqliteJournal(tmp_path / "journal.sqlite"), house.blobs, house.aggregation).recover()
    house.service.close()


@given(lost=st.sets(st.integers(1, 9), max_size=4), retracted=st.booleans(), rolled_back=st.booleans())
@settings(max_examples=25, deadline=None)
def test_whatever_is_damaged_the_rest_stays_and_every_start_gives_the_same(
    lost: set[int], retracted: bool, rolled_back: bool
) -> None:
    house = House.open()
    house.register()
    house.train(["w1", "w2", "w3"] * 3)
    if retracted:
        house.retract("w2")
    if rolled_back:
        house.roll_back(7)
    house.service.close()
    without_snapshots(house)
    for update in [e for e in house.journal.events() if isinstance(e, UpdateAccepted)]:
        if update.version in lost:
            damage(house, update.digest)
    first = recover(house, skip_damaged=True).expert("python")
    count = house.journal.count()
    second = recover(house).expert("python")
    assert house.journal.count() == count
    assert (second.version, second.digest) == (first.version, first.digest)
    held = first.updates
    assert held >= (7 if rolled_back else 6 if retracted else 9) - len(lost)


def test_a_long_replay_says_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr("fedmoe.server.history.replay.time.monotonic", lambda: float(next(clock)))
    house = House.open()
    house.register()
    house.train(["w1"] * 10)
    updates = [e for e in house.journal.events() if isinstance(e, UpdateAccepted)]
    capsys.readouterr()
    assert list(with_progress(updates)) == updates
    said = capsys.readouterr()
    assert "replaying" in said.out + said.err
    assert "seconds_left" in said.out + said.err
    house.service.close()


def test_an_expert_is_not_made_of_the_few_updates_that_are_left() -> None:
    house = House.open()
    house.register()
    house.train(["w1"] * 20)
    house.service.close()
    without_snapshots(house)
    for update in [e for e in house.journal.events() if isinstance(e, UpdateAccepted)][:18]:
        house.blobs.delete(update.digest)
    count = house.journal.count()
    with pytest.raises(DamagedUpdateError, match="version 17 of python"):
        recover(house, skip_damaged=True)
    assert house.journal.count() == count
