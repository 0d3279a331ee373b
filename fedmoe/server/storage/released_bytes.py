"""Records of updates whose bytes were deleted on purpose, and of erasures still to be done."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import sqlalchemy as sa

from fedmoe.federation.events import UpdateAccepted
from fedmoe.server.storage.event_rows import event_of
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.records import of_row
from fedmoe.server.storage.tables import ERASURE_REQUESTS, EVENTS, RELEASED_BYTES

#: Bytes were bounded (`--keep-gb`), or a worker that withdrew was erased (`retract --erase`).
Reason = Literal["keep_gb", "erase"]


@dataclass(frozen=True, slots=True)
class ReleasedBytes:
    """The bytes of an expert's updates up to version `through` may be gone: of one worker, or of all (None).

    `at` is seconds since 1970.
    """

    expert: str
    worker: str | None
    through: int
    reason: Reason
    at: float


@dataclass(frozen=True, slots=True)
class ErasureRequest:
    """A worker that is to be erased from an expert, asked for at `at` (seconds since 1970) for a reason."""

    expert: str
    worker: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True)
class StoredUpdate:
    """An update as a row: which version of which expert it made, and the blob that holds it."""

    expert: str
    version: int
    worker: str
    digest: str


def record_release(journal: Journal, release: ReleasedBytes) -> None:
    """Note what is about to be let go of; durable on return, so that a kill in the middle leaves no riddle."""
    journal.insert(RELEASED_BYTES, asdict(release))


def releases(journal: Journal) -> list[ReleasedBytes]:
    """Everything that was let go of, in order."""
    rows = journal.query(sa.select(RELEASED_BYTES).order_by(RELEASED_BYTES.c.id))
    return [of_row(ReleasedBytes, row) for row in rows]


def request_erasure(journal: Journal, request: ErasureRequest) -> None:
    """Note that an erasure was asked for; durable on return."""
    journal.put(ERASURE_REQUESTS, [asdict(request)])


def pending_erasures(journal: Journal) -> list[ErasureRequest]:
    """The erasures that were asked for and are not finished, the oldest first."""
    return [ErasureRequest(**row) for row in journal.query(sa.select(ERASURE_REQUESTS).order_by(ERASURE_REQUESTS.c.at))]


def finish_erasure(journal: Journal, expert: str, worker: str) -> None:
    """Note that an erasure is finished, if it was asked for."""
    if any((request.expert, request.worker) == (expert, worker) for request in pending_erasures(journal)):
        columns = ERASURE_REQUESTS.c
        journal.delete(ERASURE_REQUESTS.delete().where(columns.expert == expert, columns.worker == worker))


def oldest_undoable(journal: Journal, expert: str) -> int:
    """The first version that an expert can still be taken back to, as far as bytes were bounded."""
    bounded = (release.through for release in releases(journal) if release.expert == expert and release.worker is None)
    return max(bounded, default=0)


def why_released(journal: Journal, update: UpdateAccepted, keep_updates: int | None) -> str | None:
    """Why an update's bytes are not there, and what can be done; None if they should be."""
    for release in releases(journal):
        same = release.expert == update.expert and release.through >= update.version
        if same and release.worker == update.worker:
            return f"What {release.worker!r} gave was erased; versions made of it are gone for good."
        if same and release.worker is None:
            return f"Choose version {oldest_undoable(journal, update.expert)} or a later one (--keep-gb)."
    if keep_updates is not None:
        return f"Only the last {keep_updates} updates can be undone (--keep-updates)."
    return None


def stored_updates(journal: Journal, expert: str | None = None, worker: str | None = None) -> list[StoredUpdate]:
    """The updates in order, without what they say: quick for 100,000 of them."""
    columns = [EVENTS.c[name] for name in ("expert", "version", "worker", "digest")]
    query = sa.select(*columns).where(EVENTS.c.kind == "update").order_by(EVENTS.c.id)
    if expert is not None:
        query = query.where(EVENTS.c.expert == expert)
    if worker is not None:
        query = query.where(EVENTS.c.worker == worker)
    return [StoredUpdate(*row.values()) for row in journal.query(query)]


def newest_updates(journal: Journal, most: int) -> list[UpdateAccepted]:
    """The newest updates, oldest first."""
    query = sa.select(EVENTS.c.payload).where(EVENTS.c.kind == "update").order_by(EVENTS.c.id.desc()).limit(most)
    events = [event_of("update", row["payload"]) for row in journal.query(query)]
    return [event for event in reversed(events) if isinstance(event, UpdateAccepted)]
