"""What journals in databases share: rows of events are chained, every transaction notes where the journal ends then."""

from __future__ import annotations

import json
import secrets
import threading
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from fedmoe.federation.events import Event
from fedmoe.runtime import failpoints
from fedmoe.server.storage.acknowledged import AcknowledgedFile, Head, JournalGap, journal_gap
from fedmoe.server.storage.chain import COLUMNS, GENESIS, ChainEnd, link
from fedmoe.server.storage.event_rows import row_of
from fedmoe.server.storage.journal import DuplicateEventError, FormerIncarnation, Journal
from fedmoe.server.storage.tables import EVENTS, INCARNATION, INCARNATIONS_BEFORE, META

#: The key in `meta` of the journal's own note of where it ends.
HEAD = "head"


class ChainedJournal(Journal):
    """A journal in the tables of `storage.tables`, written by one process.

    With an `acknowledged` file every commit is noted there before the call returns.
    """

    def __init__(self, acknowledged: AcknowledgedFile | None) -> None:
        self._acknowledged = acknowledged
        self._lock = threading.Lock()
        self._head = Head()
        # By so much a row's number is more than that of its event.
        self._row_offset = 0

    @abstractmethod
    def _write_locked(
        self, statement: sa.Insert | sa.Delete, rows: list[dict[str, object]] | None = None, head: Head | None = None
    ) -> Any:
        """Run a statement in a transaction that ends at `head` with one more change; the caller holds the lock."""

    @staticmethod
    @abstractmethod
    def _put(table: sa.Table) -> sa.Insert:
        """A statement that adds rows, each in the place of the one with its primary key."""

    @property
    def head(self) -> Head:
        """How far the journal has come."""
        return self._head

    def gap_since(self, noted: Head | None) -> JournalGap | None:
        """What the journal lacks of what was noted; None where it has all of it, or nothing is known."""
        if noted is None:
            return None
        rows = self.query(sa.select(EVENTS.c.chain).order_by(EVENTS.c.id).limit(1).offset(max(0, noted.events - 1)))
        chain_there = GENESIS if noted.events == 0 else rows[0]["chain"] if rows else None
        return journal_gap(
            noted, self.head, chain_there, [earlier.incarnation for earlier in self.former_incarnations()]
        )

    def append(self, events: Sequence[Event], version_digests: Sequence[str | None] | None = None) -> None:
        if not events:
            return
        digests = version_digests if version_digests is not None else [None] * len(events)
        rows = [row_of(event) | {"version_digest": digest} for event, digest in zip(events, digests, strict=True)]
        with self._lock:
            number, chain = self._head.events, self._head.chain
            for row in rows:
                number += 1
                row["id"] = number + self._row_offset
                chain = link(chain, [row[name] for name in COLUMNS])
                row["chain"] = chain
            try:
                self._write_locked(EVENTS.insert(), rows, replace(self._head, events=number, chain=chain))
            except IntegrityError as error:
                raise DuplicateEventError(str(error.orig)) from error

    def put(self, table: sa.Table, rows: list[dict[str, object]]) -> None:
        with self._lock:
            self._write_locked(self._put(table), rows)

    def delete(self, statement: sa.Delete) -> None:
        with self._lock:
            self._write_locked(statement)

    def begin_incarnation(self) -> str:
        former, current, name = self.former_incarnations(), self.meta(INCARNATION), secrets.token_hex(16)
        if current is not None:
            former.append(FormerIncarnation(current, self.count()))
        changed = {INCARNATION: name, INCARNATIONS_BEFORE: json.dumps([asdict(earlier) for earlier in former])}
        rows: list[dict[str, object]] = [{"key": key, "value": value} for key, value in changed.items()]
        with self._lock:
            self._write_locked(self._put(META), rows, replace(self._head, incarnation=name))
        return name

    def _committed(self, head: Head) -> None:
        """Note that a transaction is durable, before anybody hears of it."""
        self._head = head
        failpoints.reached("journal.committed")
        if self._acknowledged is not None:
            self._acknowledged.write(head)
            failpoints.reached("journal.counted")


def checked_head(end: ChainEnd, noted: str | None, incarnation: str | None) -> Head:
    """Where the rows of events end, as noted in `meta`; raises ValueError if they end elsewhere."""
    try:
        head = Head.of_text(noted) if noted is not None else Head(end.rows, end.chain)
    except ValueError as error:
        raise ValueError(f"the note of the journal's end cannot be read: {error}") from error
    if (head.events, head.chain) != (end.rows, end.chain):
        raise ValueError(f"the journal ends after {end.rows} events, written were {head.events}")
    return replace(head, incarnation=incarnation or "")
