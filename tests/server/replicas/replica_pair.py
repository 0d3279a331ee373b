"""An owner and another replica of a federation on real sockets, in one process, without a database between them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from live import House, LiveServer, listening, open_house
from starlette.types import ASGIApp

from fedmoe.server.replicas.ownership import FEDERATION, Owners, Ownership, steady_seconds
from fedmoe.server.replicas.peers import PeerSecret
from fedmoe.server.replicas.replica_app import ReplicaApp
from fedmoe.server.replicas.tenure import OwnerCandidate, Tenure
from fedmoe.server.storage.audit import AuditHead, AuditLog
from fedmoe.server.storage.folder_blobs import FolderBlobStore

SECRET = PeerSecret("a-secret-of-the-replicas-of-a-test")


@dataclass
class FederationInMemory:
    """What the owner has open: the application of a house."""

    app: ASGIApp

    def problem(self) -> str | None:
        return None

    def close(self, abandoned: bool) -> None:
        """Nothing."""


def _open_nothing(tenure: Tenure) -> FederationInMemory:
    raise AssertionError("it is told what it owns")


class Seat(OwnerCandidate):
    """A candidate that is told who the owner is, instead of asking a database."""

    def __init__(self, name: str, app: ReplicaApp) -> None:
        super().__init__(cast(Owners, None), name, "", 3.0, _open_nothing, app.wake)
        self.looked = 0
        self._app = app

    def look(self) -> None:
        self.looked += 1

    def seat(self, owner: Ownership | None) -> None:
        """From now on this is the owner, for ever."""
        self.seen, self.seen_until = owner, math.inf
        self._app.wake()


@dataclass
class ReplicaOnSocket:
    """One replica."""

    app: ReplicaApp
    seat: Seat
    server: LiveServer
    blobs: FolderBlobStore


@dataclass
class Pair:
    """The owner `a`, the other one `b`, and the house that `a` serves."""

    house: House
    a: ReplicaOnSocket
    b: ReplicaOnSocket
    audit: AuditLog

    def own(self, term: int = 1) -> Tenure:
        """Make `a` the owner."""
        owner = Ownership(FEDERATION, "a", self.a.server.url, term, math.inf)
        tenure = Tenure(owner, math.inf, FederationInMemory(self.house.app))
        self.a.seat.tenure = tenure
        for replica in (self.a, self.b):
            replica.seat.seat(owner)
        return tenure

    def lose(self) -> None:
        """Nobody is the owner any more."""
        tenure = self.a.seat.tenure
        assert tenure is not None
        tenure.valid_until = steady_seconds() - 1.0
        self.a.seat.tenure = None
        for replica in (self.a, self.b):
            replica.seat.seat(None)


@contextmanager
def open_pair(folder: Path, tokens: bool = False, patience: float = 5.0) -> Iterator[Pair]:
    """A pair with `a` as the owner; requests wait `patience` seconds where there is none."""
    audit = AuditLog(folder, lambda: 1000.0, AuditHead())
    with (
        open_house(folder, tokens=tokens, audit=audit) as house,
        ThreadPoolExecutor(2) as pool,
        _replica("a", house.blobs, pool, patience) as a,
        # The same folder, as an object store is the same for all.
        _replica("b", FolderBlobStore(folder / "blobs", reserve_bytes=0), pool, patience) as b,
    ):
        pair = Pair(house, a, b, audit)
        pair.own()
        try:
            yield pair
        finally:
            audit.close()


@contextmanager
def _replica(name: str, blobs: FolderBlobStore, pool: ThreadPoolExecutor, patience: float) -> Iterator[ReplicaOnSocket]:
    app = ReplicaApp(SECRET, blobs, pool, patience)
    seat = Seat(name, app)
    app.attach(seat)
    with listening(app) as server:
        try:
            yield ReplicaOnSocket(app, seat, server, blobs)
        finally:
            if app._loop is not None:
                asyncio.run_coroutine_threadsafe(app.close(), app._loop).result(10)
