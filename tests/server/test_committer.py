from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future

import pytest
from builders import wait_until
from support import MANIFEST, make_flat, make_submission

from fedmoe.coordinator import CentralCoordinator, Transaction
from fedmoe.federation.events import Event, UpdateAccepted
from fedmoe.lora.adapter import FloatVector
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.journal import NotOwnerError, UnstorableError
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.server.updates.committer import Committer


class Gate:
    """A journal that waits to be let through, counts its batches, and fails when told to."""

    def __init__(self) -> None:
        self.journal = SqliteJournal(None)
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)
        self.batches: list[int] = []
        self.failure: Exception | None = None
        self.unstorable: int | None = None
        self.open.set()

    def append(self, events: Sequence[Event], version_digests: Sequence[str | None] | None = None) -> None:
        self.entered.release()
        assert self.open.wait(10)
        if self.failure is not None:
            raise self.failure
        if any(isinstance(event, UpdateAccepted) and event.sequence == self.unstorable for event in events):
            raise UnstorableError("it is odd")
        self.journal.append(events, version_digests)
        self.batches.append(len(events))


class House:
    """A coordinator with its committer on a gated journal."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.coordinator = CentralCoordinator()
        self.coordinator.register_expert("python", MANIFEST)
        self.cleaned: list[list[Event]] = []
        self.clean_up: Callable[[Transaction], None] = lambda transaction: self.cleaned.append(list(transaction.events))
        self.committer = Committer(
            self.coordinator,
            self.gate,  # type: ignore[arg-type]
            lambda: 1000.0,
            lambda transaction: self.clean_up(transaction),
        )

    def push(self, sequence: int, base_version: int = 0) -> Future[object]:
        def decide(transaction: Transaction) -> UpdateAccepted:
            event = transaction.admit(make_submission(base_version=base_version, sequence=sequence), 0.0)
            transaction.apply(event, make_flat(sequence))
            return event

        return self.committer.submit(decide)

    def block(self) -> Future[object]:
        """Hold the committer inside a commit, so that what is queued meanwhile forms the next group."""
        self.gate.open.clear()
        first = self.push(1000)
        assert self.gate.entered.acquire(timeout=10)
        return first

    @property
    def version(self) -> int:
        return self.coordinator.expert("python").version


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    made.committer.start()
    yield made
    made.gate.open.set()
    made.committer.close()
    assert not made.committer._thread.is_alive()


def version_of(answer: Future[object]) -> int:
    event = answer.result(10)
    assert isinstance(event, UpdateAccepted)
    return event.version


def test_answers_come_in_the_order_of_the_journal(house: House) -> None:
    answers = [house.push(sequence) for sequence in range(20)]
    assert [version_of(answer) for answer in answers] == list(range(1, 21))
    assert [event.version for event in house.gate.journal.events()] == list(range(1, 21))  # type: ignore[union-attr]


def test_nobody_is_answered_and_nothing_is_seen_before_it_is_durable(house: House) -> None:
    answer = house.block()
    assert not answer.done()
    assert house.version == 0
    house.gate.open.set()
    assert version_of(answer) == 1
    assert house.version == 1


def test_whoever_waits_shares_one_commit_up_to_a_limit(house: House) -> None:
    first = house.block()
    answers = [house.push(sequence) for sequence in range(100)]
    house.gate.open.set()
    assert [version_of(answer) for answer in [first, *answers]] == list(range(1, 102))
    assert house.gate.batches == [1, 64, 36]


def test_a_decision_that_reads_the_past_is_alone_in_its_group(house: House) -> None:
    first = house.block()
    before = house.push(1)
    seen: list[tuple[int, int]] = []
    alone = house.committer.submit(
        lambda transaction: seen.append((len(transaction.events), house.gate.journal.count())), alone=True
    )
    after = house.push(2)
    house.gate.open.set()
    alone.result(10)
    assert [version_of(answer) for answer in (first, before, after)] == [1, 2, 3]
    assert seen == [(0, 2)]
    assert house.gate.batches == [1, 1, 1]


def test_a_refused_decision_spoils_nothing_for_the_others(house: House) -> None:
    first = house.block()
    answers = [house.push(1), house.push(2, base_version=99), house.push(3)]
    house.gate.open.set()
    with pytest.raises(RefusedError, match="based on version 99"):
        answers[1].result(10)
    assert [version_of(answer) for answer in (first, answers[0], answers[2])] == [1, 2, 3]


def test_a_decision_that_fails_half_way_leaves_nothing_behind(house: House) -> None:
    def fail_late(transaction: Transaction) -> None:
        transaction.apply(transaction.admit(make_submission(sequence=5), 0.0), make_flat(5))
        raise RuntimeError("after the update had landed")

    first = house.block()
    before, late, after = house.push(1), house.committer.submit(fail_late), house.push(2)
    house.gate.open.set()
    with pytest.raises(RuntimeError, match="after the update had landed"):
        late.result(10)
    assert [version_of(answer) for answer in (first, before, after)] == [1, 2, 3]
    assert house.gate.journal.count() == house.version == 3


def test_a_caller_that_goes_away_neither_lands_nor_stops_the_committer(house: House) -> None:
    first = house.block()
    waiting = house.push(1)
    assert waiting.cancel()
    assert not first.cancel()  # it is being written: too late to take back
    house.gate.open.set()
    assert version_of(first) == 1
    assert version_of(house.push(2)) == 2
    assert house.gate.journal.count() == 2


def test_one_value_that_the_journal_cannot_hold_spoils_nothing_for_the_others(house: House) -> None:
    first = house.block()
    answers = [house.push(1), house.push(2), house.push(3)]
    house.gate.unstorable = 2
    house.gate.open.set()
    with pytest.raises(UnstorableError, match="cannot hold"):
        answers[1].result(10)
    assert [version_of(answer) for answer in (first, answers[0], answers[2])] == [1, 2, 3]
    assert house.committer.failed is None


def test_a_full_disk_refuses_the_group_and_the_next_one_is_tried(house: House) -> None:
    house.gate.failure = RefusedError("disk_full", "no space left.")
    with pytest.raises(RefusedError, match="no space left"):
        house.push(1).result(10)
    assert (house.version, house.committer.failed, house.cleaned) == (0, None, [])
    house.gate.failure = None
    assert version_of(house.push(1)) == 1


def test_a_failed_storage_stays_failed(house: House) -> None:
    house.gate.failure = StorageFailedError("fsync: Input/output error")
    with pytest.raises(StorageFailedError, match="Input/output"):
        house.push(1).result(10)
    house.gate.failure = None
    with pytest.raises(StorageFailedError, match="Input/output"):
        house.push(2).result(10)
    assert house.committer.failed == "fsync: Input/output error"
    assert (house.version, house.gate.journal.count()) == (0, 0)


def test_whoever_sees_the_disk_fail_stops_the_committer(house: House) -> None:
    first = house.block()
    house.committer.fail("a blob's fsync failed")
    house.committer.fail("and then everything else")
    house.gate.open.set()
    assert version_of(first) == 1  # it was on its way to the journal and is durable there
    with pytest.raises(StorageFailedError, match="a blob's fsync failed"):
        house.push(1).result(10)
    assert house.gate.journal.count() == 1


def test_a_snapshot_that_fails_costs_nobody_an_answer(house: House) -> None:
    def fail(transaction: Transaction) -> None:
        raise RefusedError("disk_full", "no space left.")

    house.clean_up = fail
    assert version_of(house.push(1)) == 1
    assert version_of(house.push(2)) == 2
    assert house.committer.failed is None


def test_a_snapshot_that_finds_the_disk_broken_stops_the_committer(house: House) -> None:
    def fail(transaction: Transaction) -> None:
        raise StorageFailedError("fsync: Input/output error")

    house.clean_up = fail
    assert version_of(house.push(1)) == 1
    with pytest.raises(StorageFailedError):
        house.push(2).result(10)


def test_closing_finishes_what_is_queued(house: House) -> None:
    first = house.block()
    answers = [first, *(house.push(sequence) for sequence in range(70))]
    threading.Timer(0.05, house.gate.open.set).start()
    house.committer.close()
    assert [version_of(answer) for answer in answers] == list(range(1, 72))


def test_closing_twice_or_before_the_start_is_fine() -> None:
    house = House()
    house.committer.close()
    house.committer.start()
    house.committer.close()
    house.committer.close()


def test_what_comes_after_the_end_is_refused_and_nobody_waits_for_ever() -> None:
    house = House()
    house.committer.start()
    house.push(0).result(10)
    house.committer.close()
    with pytest.raises(NotOwnerError):
        house.push(1).result(10)
    assert house.gate.journal.count() == 1


def test_what_was_decided_is_let_go_of_while_nothing_else_waits(house: House) -> None:
    deltas = [make_flat(number) for number in range(3)]
    alive = [weakref.ref(delta) for delta in deltas]

    def landing(number: int, delta: FloatVector) -> Callable[[Transaction], UpdateAccepted]:
        def decide(transaction: Transaction) -> UpdateAccepted:
            event = transaction.admit(make_submission(base_version=number, sequence=number), 0.0)
            transaction.apply(event, delta)
            return event

        return decide

    answers = [house.committer.submit(landing(number, delta)) for number, delta in enumerate(deltas)]
    del deltas
    assert [answer.result(30).version for answer in answers] == [1, 2, 3]
    wait_until(lambda: all(delta() is None for delta in alive), 30)
