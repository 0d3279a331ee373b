"""Clients that push until they are acknowledged, and the checker of what they were told (after the idea of etcd's)."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from support import EPOCH, LAYOUT, MANIFEST, CoordinatorProcess, make_body, make_flat, sha256

from fedmoe.coordinator import seed_of
from fedmoe.events import ExpertRegistered, UpdateAccepted
from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.initial import initial_adapter
from fedmoe.storage.journal import SqlJournal
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.messages import UpdateHeader, UpdateResult

EXPERTS = ["python", "sql"]


@dataclass(frozen=True)
class Acknowledged:
    """An update as its sender knows it: what it sent, what it was told, and how often it had to ask."""

    worker: str
    sequence: int
    base_version: int
    seed: int
    result: UpdateResult
    attempts: int


@dataclass
class Pusher:
    """One client thread; it never gives an update up and never sends the next one before the last is acknowledged."""

    url: str
    worker: str
    expert: str
    number: int
    stop: threading.Event
    acknowledged: list[Acknowledged] = field(default_factory=list)
    problem: BaseException | None = None

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name=self.worker)
        self.thread.start()

    def _run(self) -> None:
        try:
            with CoordinatorClient(self.url, timeout=10.0) as client:
                version, sequence = 0, 0
                while not self.stop.is_set():
                    # Every third update is made from an old version, every fifth has the bytes of the one before.
                    base = max(0, version - 3 * (sequence % 3 == 0))
                    seed = 1_000_000 * self.number + sequence - (sequence % 5 == 0)
                    one = self._deliver(client, sequence, base, max(0, seed))
                    self.acknowledged.append(one)
                    version, sequence = one.result.version, sequence + 1
        except BaseException as error:
            self.problem = error

    def _deliver(self, client: CoordinatorClient, sequence: int, base: int, seed: int) -> Acknowledged:
        header = UpdateHeader(expert=self.expert, worker=self.worker, epoch=EPOCH, sequence=sequence, base_version=base)
        for attempt in range(1, 5000):
            try:
                result = client.push(header, make_body(seed)).result
                return Acknowledged(self.worker, sequence, base, seed, result, attempt)
            except CoordinatorUnavailableError:
                time.sleep(0.01)
        raise AssertionError(f"{self.worker} could not deliver update {sequence}")


def register(url: str, *names: str) -> None:
    with CoordinatorClient(url) as client:
        for name in names:
            client.register(name, "w0", MANIFEST)


def kill_under_load(coordinator: CoordinatorProcess, kills: int, seed: int, pushes: int = 0) -> list[Acknowledged]:
    """Four clients push while the process is killed at random moments; ends with it running and nobody waiting.

    However slow the machine, at least about `pushes` updates are acknowledged.
    """
    moments = random.Random(seed)
    coordinator.start()
    register(coordinator.url, *EXPERTS)
    stop = threading.Event()
    pushers = [Pusher(coordinator.url, f"w{n}", EXPERTS[n % 2], n, stop) for n in range(4)]
    try:
        for _ in range(kills):
            time.sleep(moments.uniform(0.05, 0.5))
            coordinator.kill()
            coordinator.start()
        waiting = time.monotonic() + 200
        while sum(len(pusher.acknowledged) for pusher in pushers) < pushes and time.monotonic() < waiting:
            time.sleep(0.05)
    finally:
        stop.set()
        for pusher in pushers:
            pusher.thread.join()
    assert [pusher.problem for pusher in pushers] == [None] * len(pushers)
    return [one for pusher in pushers for one in pusher.acknowledged]


def read_journal(state_dir: Path) -> list[ExpertRegistered | UpdateAccepted]:
    """The events of a stopped coordinator; its database is checked whole."""
    connection = sqlite3.connect(state_dir / "journal.sqlite")
    assert list(connection.execute("PRAGMA integrity_check")) == [("ok",)]
    connection.close()
    journal = SqlJournal(state_dir / "journal.sqlite")
    events = [event for event in journal.events() if isinstance(event, ExpertRegistered | UpdateAccepted)]
    assert len(events) == journal.count()
    journal.close()
    return events


def check_history(events: Sequence[ExpertRegistered | UpdateAccepted], told: Sequence[Acknowledged]) -> None:
    """Every acknowledged update is there exactly once, as acknowledged; nothing else is; versions have no gap."""
    updates = [event for event in events if isinstance(event, UpdateAccepted)]
    found = {(event.worker, event.sequence): event for event in updates}
    assert len(found) == len(updates), "an update is in the journal twice"
    assert found.keys() == {(one.worker, one.sequence) for one in told}
    for one in told:
        event, result = found[one.worker, one.sequence], one.result
        assert (event.version, event.staleness, event.coefficient, event.digest) == (
            result.version,
            result.staleness,
            result.coefficient,
            sha256(make_body(one.seed)),
        )
        assert event.base_version == one.base_version == event.version - 1 - event.staleness
    for expert in {event.expert for event in events}:
        versions = [event.version for event in updates if event.expert == expert]
        assert versions == list(range(1, len(versions) + 1))
    for worker in {one.worker for one in told}:
        seen = [one.result.version for one in told if one.worker == worker]
        assert seen == sorted(set(seen)), "a client saw a version go back"


def fold(events: Sequence[ExpertRegistered | UpdateAccepted], told: Sequence[Acknowledged]) -> dict[str, FloatVector]:
    """Every expert by the specified rule, `expert += lr * s(tau) * delta`, from the bytes the clients sent."""
    seeds = {(one.worker, one.sequence): one.seed for one in told}
    experts: dict[str, FloatVector] = {}
    for event in events:
        if isinstance(event, ExpertRegistered):
            experts[event.expert] = initial_adapter(LAYOUT, MANIFEST.alpha, seed_of(event.expert)).flat
        else:
            delta = make_flat(seeds[event.worker, event.sequence])
            experts[event.expert] = experts[event.expert] + np.float32(event.coefficient) * delta
    return experts


def pull(url: str, names: Sequence[str]) -> Mapping[str, FloatVector]:
    """The experts' weights as anybody can download them."""
    with CoordinatorClient(url) as client:
        pulled = {name: client.pull_expert(name) for name in names}
    return {name: answer.weights for name, answer in pulled.items() if answer is not None}


def blob_files(state_dir: Path) -> set[str]:
    """Every file below the blob folder."""
    folder = state_dir / "blobs"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def named_blobs(state_dir: Path) -> set[str]:
    """The blobs that the journal of a stopped coordinator names: updates and snapshots."""
    connection = sqlite3.connect(state_dir / "journal.sqlite")
    rows = connection.execute("SELECT digest FROM events WHERE digest IS NOT NULL UNION SELECT digest FROM snapshots")
    named = {str(digest) for (digest,) in rows}
    connection.close()
    return named
