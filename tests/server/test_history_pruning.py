"""Keeping only what the last changes need: `--keep-updates`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from crash_house import House, assert_same_state
from support import make_body

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.history import History


@pytest.fixture
def pruned() -> Iterator[House]:
    """Keeps what the last four changes need; a snapshot every three versions."""
    opened = House.open(keep_updates=4)
    opened.register()
    yield opened
    opened.service.close()


def test_pruning_drops_what_undoing_the_last_changes_does_not_need(pruned: House) -> None:
    pruned.train(["w1"] * 30)
    # Versions 26 to 30 start from the snapshot of version 24.
    assert sorted(pruned.journal.snapshots("python")) == [24, 27, 30]
    assert len(list(pruned.blobs.digests())) == 3 + 6
    pruned.same_after_a_crash()


@pytest.mark.parametrize("updates", range(13, 20))
def test_the_last_changes_can_be_undone_and_earlier_ones_are_refused(pruned: House, updates: int) -> None:
    """Fault 49."""
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
    pruned.train(["w1"] * 5)
    five = pruned.expert().state
    pruned.train(["w1"] * 4)
    pruned.roll_back(5)
    pruned.train(["w2"])
    eleven = pruned.expert().state
    pruned.train(["w3"])  # the snapshot of version 12 prunes, with version 8 as the oldest to go back to
    assert pruned.roll_back(11) == 1
    assert_same_state(pruned.expert().state, eleven)
    assert pruned.roll_back(10) == 1
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
    pruned.train(["w1"] * 8)
    before = pruned.journal.snapshots("python")
    pruned.roll_back(3)  # makes version 9, whose snapshot has the bytes of version 3's and replaces it
    pruned.settle()
    three, after = pruned.expert().state, pruned.journal.snapshots("python")
    assert (sorted(before), sorted(after), after[9]) == ([3, 6], [6, 9], before[3])
    pruned.train(["w1"] * 3)
    assert pruned.roll_back(9) == 3
    assert_same_state(pruned.expert().state, three)
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

    def die(*digests: str) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(house.blobs, "delete", die)
        house.train(["w1"])  # the snapshot of version 12 prunes
    assert sorted(house.journal.snapshots("python")) == [6, 9, 12]
    orphans = len(list(house.blobs.digests()))
    house.same_after_a_crash()
    assert len(list(house.blobs.digests())) == orphans  # updates go with the next pruning, the snapshot with the trash
    house.train(["w1"] * 18)
    assert len(list(house.blobs.digests())) == 3 + 6 + 1
    house.service.close()
