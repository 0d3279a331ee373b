"""Blobs that a journal names: the digests in all its tables, read in pages."""

from __future__ import annotations

from collections.abc import Iterator

import sqlalchemy as sa

from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.tables import DATA_STATISTICS, EVENTS, SNAPSHOTS, VERDICTS

_PAGE = 10_000


def named_blobs(journal: Journal) -> Iterator[str]:
    """The digests in every table's column of that name. Those of held updates stand in their payloads only."""
    last: int | None = 0
    while last is not None:
        page = sa.select(EVENTS.c.id, EVENTS.c.digest).where(EVENTS.c.id > last).order_by(EVENTS.c.id).limit(_PAGE)
        rows = journal.query(page)
        yield from (row["digest"] for row in rows if row["digest"] is not None)
        last = rows[-1]["id"] if len(rows) == _PAGE else None
    for table in (SNAPSHOTS, DATA_STATISTICS, VERDICTS):
        found = journal.query(sa.select(table.c.digest).where(table.c.digest.is_not(None)))
        yield from (row["digest"] for row in found)
