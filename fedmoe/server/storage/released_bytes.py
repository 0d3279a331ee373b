"""What was let go of on purpose: which updates' bytes may be missing, so that nobody takes them for lost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

import sqlalchemy as sa

from fedmoe.federation.events import UpdateAccepted
from fedmoe.server.storage.event_rows import event_of
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.released_bytes_table import LET_GO, TO_ERASE
from fedmoe.server.storage.tables import EVENTS

#: Bytes were bounded (`--keep-gb`), or a worker that withdrew was erased (`retract --erase`).
Reason = Literal["keep_gb", "erase"]


@dataclass(frozen=True, slots=True)
class LetGo:
    """The bytes of an expert's updates up to version `through` may be gone: of one worker, or of all (None).

    `at` is seconds since 1970.
    """

    expert: str
    worker: str | None
    through: int
    reason: Reason
    at: float


@dataclass(frozen=True, slots=True)
class ToErase:
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


def note(journal: Journal, one: LetGo) -> None:
    """Note what is about to be let go of; durable on return, so that a kill in the middle leaves no riddle."""
    journal.change(LET_GO.insert(), [asdict(one)])


def noted(journal: Journal) -> list[LetGo]:
    """Everything that was let go of, in order."""
    columns = [column for column in LET_GO.c if column.name != "id"]
    return [LetGo(**row) for row in journal.query(sa.select(*columns).order_by(LET_GO.c.id))]


def note_to_erase(journal: Journal, wanted: ToErase) -> None:
    """Note that an erasure was asked for; durable on return."""
    journal.change(TO_ERASE.insert().prefix_with("OR REPLACE"), [asdict(wanted)])


def to_erase(journal: Journal) -> list[ToErase]:
    """The erasures that were asked for and are not finished, the oldest first."""
    return [ToErase(**row) for row in journal.query(sa.select(TO_ERASE).order_by(TO_ERASE.c.at))]


def erased(journal: Journal, expert: str, worker: str) -> None:
    """Note that an erasure is finished, if it was asked for."""
    if any((one.expert, one.worker) == (expert, worker) for one in to_erase(journal)):
        journal.change(TO_ERASE.delete().where(TO_ERASE.c.expert == expert, TO_ERASE.c.worker == worker))


def undo_ends(journal: Journal, expert: str) -> int:
    """The first version that an expert can still be taken back to, as far as bytes were bounded."""
    bounded = (one.through for one in noted(journal) if one.expert == expert and one.worker is None)
    return max(bounded, default=0)


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
    found = [event_of("update", row["payload"]) for row in journal.query(query)]
    return [event for event in reversed(found) if isinstance(event, UpdateAccepted)]


def forget_log(journal: Journal) -> None:
    """Empty the log beside a journal, so that it holds nothing any more of rows that were removed."""
    journal.query(sa.text("PRAGMA wal_checkpoint(TRUNCATE)"))


def named_by_others(updates: Iterable[StoredUpdate], worker: str) -> set[str]:
    """The blobs that updates of other workers name: equal bytes are one blob, whoever sent them."""
    return {update.digest for update in updates if update.worker != worker}
