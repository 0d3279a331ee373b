"""Replicas of one federation in processes of their own, on a real PostgreSQL and S3 server, and their clients."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import httpx2
import numpy as np
import s3_server
from crash_load import EXPERTS, Pusher, Told, fold, landed, pull
from forks import Fork
from holding_proxy import HoldingProxy
from postgres_server import PostgresServer
from push_histories import client_faults, faults_of
from support import CoordinatorProcess

from fedmoe.federation.events import ExpertRegistered, UpdateAccepted
from fedmoe.server.replicas.ownership import Owners, Ownership
from fedmoe.server.storage.postgres import postgres_engine
from fedmoe.server.storage.postgres_journal import PostgresJournal
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, PushResult
from fedmoe.wire.contract.messages import UpdateHeader
from fedmoe.wire.pulled_weights import PulledExpert

_BUCKET = "federation"
Result = TypeVar("Result")


@dataclass
class Replica(CoordinatorProcess):
    """One replica; its way to the database is a proxy that can be held."""

    name: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    database: HoldingProxy = field(kw_only=True)

    @property
    def log(self) -> Path:
        return self.state_dir.with_suffix(".log")

    def launch(self, failpoints: str) -> Fork:
        environment = os.environ | self.environment | {"FEDMOE_FAILPOINTS": failpoints, "OMP_NUM_THREADS": "1"}
        return Fork(self.command()[1:], self.log, environment=environment)

    def command(self) -> list[str]:
        return [*super().command(), "--replica", self.name, "--advertise", self.url]

    @property
    def lives(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def logged(self, event: str) -> list[dict[str, object]]:
        """The lines of its log about an event."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("event") == event]


class ChunkedTransport(httpx2.HTTPTransport):
    """Sends bodies without their length, so that a replica puts even short ones into the blob store first."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.headers.pop("content-length", "0") != "0":
            request.headers["transfer-encoding"] = "chunked"
        return super().handle_request(request)


class RotatingClient:
    """A client of several addresses, as one behind a balancer: after a failure it asks the next one."""

    def __init__(self, urls: Sequence[str], timeout: float, first: int = 0, chunked: bool = False) -> None:
        self._clients = [
            CoordinatorClient(url, timeout=timeout, attempts=1, transport=ChunkedTransport() if chunked else None)
            for url in urls
        ]
        self._current = first % len(urls)

    def __enter__(self) -> RotatingClient:
        return self

    def __exit__(self, *error: object) -> None:
        for client in self._clients:
            client.close()

    def push(self, header: UpdateHeader, body: bytes) -> PushResult:
        return self._asked(lambda client: client.push(header, body))

    def pull_expert(self, expert: str) -> PulledExpert | None:
        return self._asked(lambda client: client.pull_expert(expert))

    def _asked(self, call: Callable[[CoordinatorClient], Result]) -> Result:
        try:
            return call(self._clients[self._current])
        except CoordinatorUnavailableError:
            self._current = (self._current + 1) % len(self._clients)
            raise


@dataclass
class RotatingPusher(Pusher):
    """A client thread that knows every replica."""

    urls: Sequence[str] = ()
    chunked: bool = False

    def connect(self) -> RotatingClient:
        return RotatingClient(self.urls, self.timeout, self.number, self.chunked)


@dataclass
class ReplicaHouse:
    """A federation's replicas, and what they share."""

    folder: Path
    server: PostgresServer
    url: str
    replicas: dict[str, Replica] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.owners = Owners(postgres_engine(self.url), 5.0)
        self.owners.make_table()

    @property
    def urls(self) -> list[str]:
        return [replica.url for replica in self.replicas.values()]

    def owner(self) -> Ownership | None:
        """Whoever owns the federation now, by the database."""
        row = self.owners.look()
        return None if row is None or row.over else row

    def owner_after(self, term: int, seconds: float = 60.0) -> Ownership:
        """The first owner of a later term."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            row = self.owner()
            if row is not None and row.term > term:
                return row
            time.sleep(0.05)
        raise AssertionError(f"nobody took over after term {term}: {self.logs()}")

    def start(self, *names: str) -> None:
        """Start replicas, all where none is named, and wait until somebody owns the federation."""
        for name in names or self.replicas:
            self.replicas[name].start()
        self.owner_after(0)

    def start_pushers(self, stop: threading.Event, count: int = 4, chunked: int = 0) -> list[RotatingPusher]:
        """Clients that know all replicas, half of them on each expert; the first `chunked` send no length of bodies."""
        return [
            RotatingPusher(
                self.urls[0], f"w{n}", EXPERTS[n % 2], n, stop, timeout=8.0, urls=self.urls, chunked=n < chunked
            )
            for n in range(count)
        ]

    def logs(self) -> str:
        return "\n".join(f"{name}: {replica.log.read_text()[-3000:]}" for name, replica in self.replicas.items())

    def faults(self, told: Told) -> list[str]:
        """What is wrong with what clients saw, once nobody sends any more; ends with all replicas stopped."""
        seen = pull(self.owner_after(0).url, EXPERTS)  # another one may still be starting
        faults = [
            f"{name} ended with status {status}"
            for name, replica in self.replicas.items()
            if replica.lives and (status := replica.stop()) != 0
        ]
        events = self.events()
        # A replica sends what it passed on to the next owner as well: what a client sent once may be a repetition.
        pushes = [replace(push, attempts=push.attempts + 1) for push in told.pushes]
        faults += faults_of(pushes, told.reads, landed(events)) + client_faults(pushes)
        expected = fold(events, told.seeds)
        # Replayed by a process that knows nothing but the database and the object store.
        self.start(next(iter(self.replicas)))
        replayed = pull(self.urls[0], EXPERTS)
        self.replicas[next(iter(self.replicas))].stop()
        for name in EXPERTS:
            for moment, weights in (("before the stop", seen[name]), ("after a replay", replayed[name])):
                if not np.array_equal(weights, expected[name]):
                    faults.append(f"{name} had other weights {moment} than its updates make")
        return faults

    def events(self) -> list[ExpertRegistered | UpdateAccepted]:
        """The journal of a federation whose replicas have stopped; every row of it is checked."""
        journal = PostgresJournal(self.url)
        try:
            return [event for event in journal.events() if isinstance(event, ExpertRegistered | UpdateAccepted)]
        finally:
            journal.close()


@contextmanager
def open_house(
    folder: Path, server: PostgresServer, count: int = 3, lease: float = 1.0, arguments: Sequence[str] = ()
) -> Iterator[ReplicaHouse]:
    """Replicas that are not started yet; whatever of them lives at the end is killed."""
    url = server.database()
    secret = folder / "secret"
    secret.write_text("a-secret-of-the-replicas-of-a-test-house\n")
    secret.chmod(0o600)
    with s3_server.moto_server(folder / "moto.log") as port:
        s3_server.make_bucket(port, _BUCKET)
        house = ReplicaHouse(folder, server, url)
        for name in [f"r{number}" for number in range(count)]:
            database = HoldingProxy(server.port)
            shared = ["--replica-secret-file", str(secret), "--blobs", f"s3://{_BUCKET}/tests"]
            house.replicas[name] = Replica(
                folder / name,
                arguments=[*shared, "--lease-seconds", f"{lease:g}", *arguments],
                name=name,
                environment=s3_server.environment(f"http://127.0.0.1:{port}")
                | {"FEDMOE_DATABASE_URL": url.replace(f":{server.port}/", f":{database.port}/")},
                database=database,
            )
        try:
            yield house
        finally:
            for replica in house.replicas.values():
                if replica.process is not None:
                    replica.send(signal.SIGCONT)
                    replica.kill()
                replica.database.close()
            house.owners.close()
