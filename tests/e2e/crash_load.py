"""Clients that push, pull and write down what they were told, while the coordinator they talk to is disturbed."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from push_histories import Answer, Identity, Landed, Push, Read
from support import EPOCH, LAYOUT, MANIFEST, CoordinatorProcess, make_body, make_flat, sha256

from fedmoe.coordinator import seed_of
from fedmoe.federation.events import ExpertRegistered, UpdateAccepted
from fedmoe.lora.adapter import FloatVector, initial_adapter
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.chained_journal import ChainedJournal
from fedmoe.server.storage.postgres_journal import PostgresJournal
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, PushResult
from fedmoe.wire.contract.messages import UpdateHeader
from fedmoe.wire.pulled_weights import PulledExpert

EXPERTS = ["python", "sql"]


class Client(Protocol):
    """What is used of a client of the coordinator."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def push(self, header: UpdateHeader, body: bytes) -> PushResult: ...

    def pull_expert(self, expert: str) -> PulledExpert | None: ...


@dataclass(frozen=True)
class Storage:
    """Where a coordinator has its journal: in its folder, or in the database of a URL."""

    url: str | None = None

    @property
    def arguments(self) -> tuple[str, ...]:
        return ("--database-url", self.url) if self.url is not None else ()

    def journal(self, state_dir: Path) -> ChainedJournal:
        """The journal of a stopped coordinator, checked while it is opened."""
        if self.url is not None:
            return PostgresJournal(self.url)
        return SqliteJournal(state_dir / "journal.sqlite")


IN_FOLDER = Storage()


@dataclass(frozen=True)
class Told:
    """What all clients sent and were told; `seeds` makes an update's bytes again."""

    pushes: list[Push]
    reads: list[Read]
    seeds: dict[Identity, int]


@dataclass
class Pusher:
    """One client thread, one push after the other; each is sent again until it is answered.

    Unless `steady`, it now and then gives an unanswered push up for good, so that nobody knows what became of it, and
    repeats one that was acknowledged.
    """

    url: str
    worker: str
    expert: str
    number: int
    stop: threading.Event
    steady: bool = False
    timeout: float = 10.0
    pushes: list[Push] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    seeds: dict[Identity, int] = field(default_factory=dict)
    problem: BaseException | None = None
    incarnation: str = ""
    version: int = 0

    def __post_init__(self) -> None:
        self.moods = random.Random(self.number)
        self.thread = threading.Thread(target=self._run, name=self.worker)
        self.thread.start()

    def connect(self) -> Client:
        """Whoever it talks to."""
        return CoordinatorClient(self.url, timeout=self.timeout, attempts=1)

    def _run(self) -> None:
        try:
            with self.connect() as client:
                sequence = 0
                while not self.stop.is_set():
                    if not self.incarnation and not self._look(client):
                        time.sleep(0.02)
                        continue
                    # Every third update is made from an old version, every fifth has the bytes of the one before.
                    base = max(0, self.version - 3 * (sequence % 3 == 0))
                    seed = 1_000_000 * self.number + sequence - (sequence % 5 == 0)
                    one = self._deliver(client, self._new(sequence, base, max(0, seed)))
                    self.pushes.append(one)
                    self.version, sequence = one.version or self.version, sequence + 1
                    if one.turned_away:
                        self.incarnation = ""  # go on from what is there now
                    elif sequence % 4 == 0:
                        self._look(client)
        except BaseException as error:
            self.problem = error

    def _new(self, sequence: int, base: int, seed: int) -> Push:
        identity = (self.worker, EPOCH, sequence)
        self.seeds[identity] = seed
        body = sha256(make_body(seed))
        return Push(self.expert, identity, base, body, time.monotonic(), attempts=0, incarnation=self.incarnation)

    def _deliver(self, client: Client, one: Push) -> Push:
        answers = 1 if self.steady or self.moods.random() < 0.95 else 2
        gives_up = not self.steady and self.moods.random() < 0.05
        for _ in range(3 if gives_up else 5000):
            answered = len(one.answers)
            one = self._try(client, one)
            if one.refused or one.turned_away or len(one.answers) == answers:
                return one
            if len(one.answers) == answered:
                time.sleep(0.02)
        assert gives_up, f"{one} could not be delivered"
        return one

    def _try(self, client: Client, one: Push) -> Push:
        worker, epoch, sequence = one.identity
        header = UpdateHeader(
            expert=one.expert,
            worker=worker,
            epoch=epoch,
            sequence=sequence,
            base_version=one.base_version,
            incarnation=one.incarnation,
        )
        one = replace(one, attempts=one.attempts + 1)
        try:
            told = client.push(header, make_body(self.seeds[one.identity])).result
        except CoordinatorUnavailableError:
            return one
        except RefusedError as error:
            if error.code == "other_history":
                return replace(one, turned_away=str(error.facts["incarnation"]))
            return replace(one, refused=error.code)
        # An answer names its history only to clients that know that key.
        incarnation = told.incarnation or one.incarnation
        known = (told.version, told.duplicate, told.staleness, told.coefficient, incarnation)
        answer = Answer(time.monotonic(), *known)
        return replace(one, answers=(*one.answers, answer))

    def _look(self, client: Client) -> bool:
        """Pull the expert; a client that knows no history goes on with what it sees."""
        invoked = time.monotonic()
        try:
            seen = client.pull_expert(self.expert)
        except CoordinatorUnavailableError:
            return False
        assert seen is not None
        incarnation = seen.incarnation or ""
        self.reads.append(Read(self.expert, seen.version, seen.digest, invoked, time.monotonic(), incarnation))
        if not self.incarnation:
            self.incarnation, self.version = incarnation, seen.version
        return True


def register(url: str, *names: str) -> None:
    with CoordinatorClient(url) as client:
        for name in names:
            client.register(name, "w0", MANIFEST)


def start_pushers(url: str, stop: threading.Event, steady: bool = False, timeout: float = 10.0) -> list[Pusher]:
    """Four clients, two on each expert."""
    return [Pusher(url, f"w{n}", EXPERTS[n % 2], n, stop, steady, timeout) for n in range(4)]


def gather(pushers: Sequence[Pusher]) -> Told:
    """Wait for clients that were told to stop; what went wrong in one is raised here."""
    for pusher in pushers:
        pusher.thread.join()
    for pusher in pushers:
        if pusher.problem is not None:
            raise AssertionError(f"the client {pusher.worker} gave up") from pusher.problem
    return Told(
        [one for pusher in pushers for one in pusher.pushes],
        [one for pusher in pushers for one in pusher.reads],
        {identity: seed for pusher in pushers for identity, seed in pusher.seeds.items()},
    )


def kill_under_load(coordinator: CoordinatorProcess, kills: int, seed: int, wait: Callable[[], object]) -> Told:
    """Four steady clients push while the process is killed at random moments; ends with it running, nobody waiting.

    After the last kill the load goes on until `wait` returns.
    """
    moments = random.Random(seed)
    coordinator.start()
    register(coordinator.url, *EXPERTS)
    stop = threading.Event()
    pushers = start_pushers(coordinator.url, stop, steady=True)
    try:
        for _ in range(kills):
            time.sleep(moments.uniform(0.05, 0.5))
            coordinator.kill()
            coordinator.start()
        wait()
    finally:
        stop.set()
    return gather(pushers)


def read_journal(state_dir: Path, storage: Storage = IN_FOLDER) -> list[ExpertRegistered | UpdateAccepted]:
    """The events of a stopped coordinator; its journal is checked whole."""
    if storage.url is None:
        connection = sqlite3.connect(state_dir / "journal.sqlite")
        assert list(connection.execute("PRAGMA integrity_check")) == [("ok",)]
        connection.close()
    with closing(storage.journal(state_dir)) as journal:
        events = [event for event in journal.events() if isinstance(event, ExpertRegistered | UpdateAccepted)]
        assert len(events) == journal.count()
    return events


def landed(events: Sequence[ExpertRegistered | UpdateAccepted]) -> list[Landed]:
    """The updates among events, as the checker of histories takes them."""
    return [
        Landed(
            event.expert,
            (event.worker, event.epoch, event.sequence),
            event.version,
            event.base_version,
            event.digest,
            event.staleness,
            event.coefficient,
        )
        for event in events
        if isinstance(event, UpdateAccepted)
    ]


def fold(events: Sequence[ExpertRegistered | UpdateAccepted], seeds: Mapping[Identity, int]) -> dict[str, FloatVector]:
    """Every expert by the specified rule, `expert += lr * s(tau) * delta`, from the bytes the clients sent."""
    experts: dict[str, FloatVector] = {}
    for event in events:
        if isinstance(event, ExpertRegistered):
            experts[event.expert] = initial_adapter(LAYOUT, MANIFEST.alpha, seed_of(event.expert)).flat
        else:
            delta = make_flat(seeds[event.worker, event.epoch, event.sequence])
            experts[event.expert] = experts[event.expert] + np.float32(event.coefficient) * delta
    return experts


def pull(url: str, names: Sequence[str]) -> Mapping[str, FloatVector]:
    """The experts' weights as anybody can download them."""
    with CoordinatorClient(url) as client:
        pulled = {name: client.pull_expert(name) for name in names}
    return {name: answer.weights for name, answer in pulled.items() if answer is not None}


def incarnation_at(url: str) -> str:
    """Which history a coordinator with the expert `python` is in."""
    with CoordinatorClient(url) as client:
        pulled = client.pull_expert("python")
    assert pulled is not None
    return pulled.incarnation or ""


def blob_files(state_dir: Path) -> set[str]:
    """Every file below the blob folder."""
    folder = state_dir / "blobs"
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def named_blobs(state_dir: Path, storage: Storage = IN_FOLDER) -> set[str]:
    """The blobs that the journal of a stopped coordinator names: updates and snapshots."""
    with closing(storage.journal(state_dir)) as journal:
        return set(journal.named_blobs())
