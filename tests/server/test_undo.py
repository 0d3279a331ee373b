"""A rollback and a retraction are worked out beside the pushes, and end with the bits that a replay gives."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from memory_blobs import MemoryBlobStore
from support import LAYOUT, MANIFEST, make_body, make_flat, make_push, open_service

from fedmoe.coordinator import Aggregation
from fedmoe.federation.events import ExpertRegistered, ExpertRolledBack, UpdateAccepted
from fedmoe.lora.adapter import FloatVector, initial_adapter
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.history import History, RebuiltState
from fedmoe.server.service import CoordinatorService
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.server.upkeep import undo
from fedmoe.wire.contract.messages import (
    ChangeResult,
    ManifestMessage,
    RegisterRequest,
    RetractRequest,
    RollbackRequest,
)


@pytest.fixture
def service() -> Iterator[CoordinatorService]:
    journal = SqliteJournal(None)
    service = open_service(journal, MemoryBlobStore(), Aggregation(0.5))
    wanted = RegisterRequest(expert="python", worker="w1", manifest=ManifestMessage.of(MANIFEST))
    asyncio.run(service.register(wanted))
    yield service
    service.close()
    journal.close()


def push(service: CoordinatorService, worker: str, seed: int) -> None:
    base = service.coordinator.expert("python").version
    asyncio.run(service.intake.push(*make_push(make_body(seed), base, seed, worker)))


def naive(service: CoordinatorService, kept: Callable[[UpdateAccepted], bool]) -> FloatVector:
    """The specified rule, once more, over the journal's updates that `kept` keeps."""
    events = list(service.journal.events("python"))
    registered = events[0]
    assert isinstance(registered, ExpertRegistered)
    weights = initial_adapter(LAYOUT, MANIFEST.alpha, registered.seed).flat
    for event in events:
        if isinstance(event, UpdateAccepted) and kept(event):
            weights = weights + make_flat(event.sequence) * np.float32(event.coefficient)
    return weights


class Gate:
    """Holds rebuilding in `History` back until a test lets it go on, and counts how often it began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.there, self.go_on, self.times = threading.Event(), threading.Event(), 0
        self.threads: list[str] = []
        real = getattr(History, name)

        def slow(history: History, *given: object) -> RebuiltState:
            found: RebuiltState = real(history, *given)
            self.times += 1
            self.threads.append(threading.current_thread().name)
            self.there.set()
            assert self.go_on.wait(30)
            return found

        monkeypatch.setattr(History, name, slow)


def meanwhile(call: Callable[[], ChangeResult], gate: Gate, pushes: Callable[[], None]) -> ChangeResult:
    """What the call gives if the pushes come, and are answered, while it rebuilds."""
    results: list[ChangeResult | BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    assert gate.there.wait(30)
    try:
        pushes()
    finally:
        gate.go_on.set()
        thread.join(30)
    (result,) = results
    if isinstance(result, BaseException):
        raise result
    return result


@pytest.mark.parametrize("more", [3, 3 * undo._FEW])
def test_what_lands_while_a_retraction_is_worked_out_is_in_it_or_taken_out_too(
    service: CoordinatorService, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    for seed in range(7):
        push(service, f"w{seed % 2}", seed)
    gate = Gate(monkeypatch, "without_worker")

    def pushes() -> None:
        for seed in range(7, 7 + more):
            push(service, f"w{seed % 3}", seed)

    call = lambda: asyncio.run(service.undo.retract(RetractRequest(expert="python", worker="w1")))  # noqa: E731
    result = meanwhile(call, gate, pushes)
    mine = sum(1 for e in service.journal.events("python") if isinstance(e, UpdateAccepted) and e.worker == "w1")
    assert (result.version, result.removed) == (7 + more + 1, mine)
    assert (gate.times, gate.threads[0].startswith("fedmoe-undo")) == (1, True)
    weights = service.coordinator.expert("python").state.weights
    np.testing.assert_array_equal(weights, naive(service, lambda update: update.worker != "w1"))


def test_what_lands_while_a_rollback_is_worked_out_is_taken_back_with_it(
    service: CoordinatorService, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(5):
        push(service, "w1", seed)
    gate = Gate(monkeypatch, "at_version")
    call = lambda: asyncio.run(service.undo.roll_back(RollbackRequest(expert="python", to_version=2)))  # noqa: E731
    result = meanwhile(call, gate, lambda: push(service, "w2", 5))
    assert (result.version, result.removed) == (7, 4)
    np.testing.assert_array_equal(
        service.coordinator.expert("python").state.weights, naive(service, lambda update: update.version <= 2)
    )


def test_if_more_than_updates_came_between_it_begins_anew(
    service: CoordinatorService, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(6):
        push(service, f"w{seed % 2}", seed)
    gate = Gate(monkeypatch, "without_worker")
    rollback = RollbackRequest(expert="python", to_version=3)

    def roll_back() -> None:
        # The other change has one thread with it: this one is decided as a second committer of the queue would.
        expert = service.coordinator.expert("python")
        state = service._history.at_version(expert, 3)
        event = ExpertRolledBack(rollback.expert, 3, expert.version + 1, "", 1.0)
        service.committer.submit(
            lambda transaction: transaction.apply(event, rebuilt=state.state, since=state.since), alone=True
        ).result(20)

    call = lambda: asyncio.run(service.undo.retract(RetractRequest(expert="python", worker="w1")))  # noqa: E731
    result = meanwhile(call, gate, roll_back)
    assert (result.version, result.removed, gate.times) == (8, 1, 2)
    np.testing.assert_array_equal(
        service.coordinator.expert("python").state.weights,
        naive(service, lambda update: update.version <= 3 and update.worker != "w1"),
    )


def test_when_nothing_else_helps_the_committer_works_it_out(
    service: CoordinatorService, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(6):
        push(service, f"w{seed % 2}", seed)
    gate = Gate(monkeypatch, "without_worker")
    gate.go_on.set()
    monkeypatch.setattr(History, "caught_up", lambda *given: None)
    result = asyncio.run(service.undo.retract(RetractRequest(expert="python", worker="w1")))
    assert (result.removed, gate.times) == (3, undo._TRIES // 2 + 2)
    assert gate.threads[-1] == "fedmoe-committer"
    np.testing.assert_array_equal(
        service.coordinator.expert("python").state.weights, naive(service, lambda update: update.worker != "w1")
    )


def test_what_cannot_be_taken_back_is_refused_at_once(service: CoordinatorService) -> None:
    push(service, "w1", 0)
    for call in (
        service.undo.retract(RetractRequest(expert="python", worker="nobody")),
        service.undo.roll_back(RollbackRequest(expert="python", to_version=5)),
    ):
        with pytest.raises(RefusedError):
            asyncio.run(call)
    assert service.coordinator.expert("python").version == 1
