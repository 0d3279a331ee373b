"""Rows of the statistics that workers report."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

import sqlalchemy as sa

from fedmoe.server.storage.tables import STATISTICS


@dataclass(frozen=True, slots=True)
class Statistic:
    """A small fact a worker chose to send (for example a held-out loss), kept like an update."""

    expert: str
    worker: str
    kind: str
    payload: Mapping[str, object]
    at: float

    def to_row(self) -> dict[str, object]:
        """The columns of a row; raises ValueError for numbers that JSON cannot hold."""
        return asdict(self) | {"payload": json.dumps(dict(self.payload), allow_nan=False)}


@dataclass(frozen=True, slots=True)
class StoredStatistic:
    """A row: its number, which rises, what it tells, and the bytes of that as JSON."""

    id: int
    statistic: Statistic
    size: int

    @classmethod
    def of_row(cls, row: sa.RowMapping) -> StoredStatistic:
        statistic = Statistic(row["expert"], row["worker"], row["kind"], json.loads(row["payload"]), row["at"])
        return cls(row["id"], statistic, len(row["payload"]))


def statistics_query(expert: str | None = None, ids: Collection[int] | None = None) -> sa.Select[tuple[object, ...]]:
    """The rows in order, of one expert or with these numbers if any are given."""
    query = sa.select(STATISTICS).order_by(STATISTICS.c.id)
    if expert is not None:
        query = query.where(STATISTICS.c.expert == expert)
    return query if ids is None else query.where(STATISTICS.c.id.in_(ids))


def dropping(ids: Collection[int]) -> sa.Delete:
    """The statement that lets rows go."""
    return STATISTICS.delete().where(STATISTICS.c.id.in_(ids))
