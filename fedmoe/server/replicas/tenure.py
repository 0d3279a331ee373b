"""A replica's time as the owner: takes the lease when it is free, renews it, drops its memory once it is lost."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import sqlalchemy as sa
import structlog
from starlette.types import ASGIApp

from fedmoe.runtime.errors import ExpectedError
from fedmoe.server.replicas.ownership import (
    Connections,
    Owners,
    Ownership,
    OwnersUnknownError,
    fence,
    next_step,
    pause_before,
    steady_seconds,
)
from fedmoe.server.storage.journal import NotOwnerError

_log = structlog.get_logger("fedmoe.replica")

# So many leases a replica that could not open the federation leaves it to others.
_REST_LEASES = 5


class OpenFederation(Protocol):
    """The federation as its owner has it in memory; `app` answers requests."""

    @property
    def app(self) -> ASGIApp: ...

    def problem(self) -> str | None:
        """Why nothing more can be decided with what is in memory; None as a rule."""
        ...

    def close(self, abandoned: bool) -> None:
        """Drop it. `abandoned`: another replica decides now, or nothing can be written; else finish what is queued."""
        ...


@dataclass
class Tenure:
    """One term of this replica: open once the federation is recovered, lost for good once another term begins.

    `valid_until` is in `steady_seconds`: counted from before the lease was asked for, so it ends before the database
    lets anybody else in.
    """

    ownership: Ownership
    valid_until: float
    federation: OpenFederation | None = None
    lost: str | None = None
    #: The lease ended, and it is not known whether another term has begun.
    suspended: bool = False
    #: Those of the journal.
    connections: Connections = field(default_factory=Connections)
    opening: threading.Thread | None = None

    @property
    def valid(self) -> bool:
        """Whether what is in memory is what all acknowledged changes made."""
        return self.problem is None and steady_seconds() < self.valid_until

    @property
    def problem(self) -> str | None:
        """Why the term must end."""
        return self.lost or (self.federation.problem() if self.federation is not None else None)

    def fence(self, lease: float) -> Callable[[sa.Connection], None]:
        """The fence of this term's writes, each of which renews the lease of so many seconds."""
        check = fence(self.ownership, lease)

        def checked(connection: sa.Connection) -> None:
            driver = connection.connection.driver_connection
            assert driver is not None, "it is open"
            self.connections.add(driver)
            try:
                check(connection)
            except NotOwnerError as error:
                self.lost = self.lost or str(error)
                raise

        return checked


class OwnerCandidate:
    """Looks at the owners from a thread of its own; opens the federation when this replica becomes the owner.

    `changed` is called, in that thread, whenever requests that wait should look again.
    """

    def __init__(
        self,
        owners: Owners,
        name: str,
        url: str,
        lease: float,
        open_federation: Callable[[Tenure], OpenFederation],
        changed: Callable[[], None],
    ) -> None:
        self._owners = owners
        self._name, self._url, self._lease = name, url, lease
        self._open_federation = open_federation
        self._changed = changed
        self._wake = threading.Event()
        # One step at a time: a lease that was given back is not renewed.
        self._step = threading.Lock()
        self._table_made = False
        self._stopped = threading.Event()
        self._leaving = False
        self._rest_until = 0.0
        self._closing: threading.Thread | None = None
        self._thread = threading.Thread(target=self._run, name="fedmoe-replica", daemon=True)
        #: Why the database does not say who the owner is; None while it does.
        self.unreachable: str | None = None
        #: This replica's term, None without one.
        self.tenure: Tenure | None = None
        #: The newest row that was read, and until when it was valid, in `steady_seconds`.
        self.seen: Ownership | None = None
        self.seen_until = 0.0

    def start(self) -> None:
        self._thread.start()

    def owns(self, row: Ownership) -> bool:
        """Whether the owner in a row is this replica."""
        return row.replica == self._name

    def look(self) -> None:
        """Read the owners soon: the known one did not answer as the owner."""
        self._wake.set()

    def leave(self) -> None:
        """Give the duty back, with everything that was accepted finished, and never take it again."""
        with self._step:
            self._leaving = True
            tenure, self.tenure = self.tenure, None
            if tenure is not None:
                # What is still under way is answered by the next owner.
                tenure.lost = tenure.lost or "this replica is stopping"
                self._close(tenure, abandoned=False)
        self._changed()

    def stop(self) -> None:
        """`leave`, and end the thread."""
        self._stopped.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join()
        self.leave()
        if self._closing is not None:
            self._closing.join()

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._step:
                    self._turn()
                self.unreachable = None
            except OwnersUnknownError as error:
                if self.unreachable is None:
                    _log.warning("owners_unknown", reason=str(error))
                self.unreachable = str(error)
                self._suspend()
            except Exception as error:
                _log.error("replica_turn_failed", reason=repr(error))
            chance = random.random()  # noqa: S311
            owner = self.tenure is not None
            self._wake.wait(self._lease / 3 if owner else pause_before(self.seen, self._lease, chance))
            self._wake.clear()
            # However often somebody asks to look, the database is left alone for a moment.
            self._stopped.wait(self._lease / 30)

    def _turn(self) -> None:
        if not self._table_made:
            self._owners.make_table()
            self._table_made = True
        began, tenure = steady_seconds(), self.tenure
        if tenure is not None:
            self._keep(tenure, began)
            return
        row = self._owners.look()
        self._note(row, began)
        closed = self._closing is None or not self._closing.is_alive()
        may_own = closed and not self._leaving and began >= self._rest_until
        if next_step(row, may_own) == "follow":
            return
        ownership = self._owners.take(self._name, self._url, self._lease)
        if ownership is not None:
            self.tenure = tenure = Tenure(ownership, began + self._lease)
            tenure.opening = threading.Thread(target=self._open, args=[tenure], name="fedmoe-takeover", daemon=True)
            tenure.opening.start()

    def _keep(self, tenure: Tenure, began: float) -> None:
        reason = tenure.problem
        if reason is None:
            if self._owners.renew(tenure.ownership, self._lease):
                tenure.valid_until, tenure.suspended = began + self._lease, False
                self._note(tenure.ownership, began)
                return
            reason = "another replica took over"
        tenure.lost = reason
        _log.warning("owner_lost", term=tenure.ownership.term, reason=reason)
        self.tenure = None
        self._closing = threading.Thread(target=self._close, args=[tenure, True], name="fedmoe-drop", daemon=True)
        self._closing.start()
        self._changed()

    def _suspend(self) -> None:
        """Answer nothing more once the lease has ended while the database is away; a renewal goes on with the term."""
        tenure = self.tenure
        if tenure is None or tenure.valid:
            return
        if not tenure.suspended:
            _log.warning("owner_suspended", term=tenure.ownership.term, reason="the database does not answer")
        tenure.suspended = True
        # What waits for the database would wait as long as it is away.
        tenure.connections.cut()

    def _open(self, tenure: Tenure) -> None:
        term, began = tenure.ownership.term, steady_seconds()
        try:
            tenure.federation = self._open_federation(tenure)
        except Exception as error:
            reason = str(error) if isinstance(error, ExpectedError) else repr(error)
            _log.error("owner_failed", term=term, reason=reason)
            self._rest_until = steady_seconds() + _REST_LEASES * self._lease
            tenure.lost = f"the federation could not be opened: {reason}"
            self._wake.set()
            return
        _log.info("owner_changed", owner=self._name, term=term, seconds=round(steady_seconds() - began, 3))
        self._changed()

    def _close(self, tenure: Tenure, abandoned: bool) -> None:
        """Drop what a term had in memory, and let the next one begin."""
        if abandoned:
            tenure.connections.cut()
        if tenure.opening is not None:
            tenure.opening.join()
        if tenure.federation is not None:
            try:
                tenure.federation.close(abandoned)
            except Exception as error:
                _log.error("closing_failed", term=tenure.ownership.term, reason=repr(error))
            tenure.federation = None
        try:
            self._owners.give_back(tenure.ownership)
        except OwnersUnknownError as error:
            _log.warning("owners_unknown", reason=str(error))

    def _note(self, row: Ownership | None, began: float) -> None:
        before, self.seen = self.seen, row
        self.seen_until = 0.0 if row is None else began + row.left
        if row is not None and (before is None or before.term != row.term):
            if row.replica != self._name:
                _log.info("owner_changed", owner=row.replica, term=row.term, url=row.url)
            self._changed()
