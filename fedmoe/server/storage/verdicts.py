"""Rows of the evaluation gate's verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import sqlalchemy as sa

VERDICTS = sa.Table(
    "gateway_verdicts",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("digest", sa.Text),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)


@dataclass(frozen=True, slots=True)
class GatewayVerdict:
    """One verdict; `digest` names the blob of the gateway that it published, None where the old one stayed.

    `at` is seconds since 1970.
    """

    digest: str | None
    payload: Mapping[str, object]
    at: float

    def to_row(self) -> dict[str, object]:
        """The verdict as a row; raises ValueError for numbers that JSON cannot hold."""
        return {"digest": self.digest, "payload": json.dumps(dict(self.payload), allow_nan=False), "at": self.at}

    @classmethod
    def of_row(cls, row: sa.RowMapping) -> Self:
        """The verdict that `to_row` wrote."""
        return cls(row["digest"], json.loads(row["payload"]), row["at"])


def newest_verdicts(limit: int, published_only: bool) -> sa.Select[tuple[str | None, str, float]]:
    """The query for the newest verdicts, the newest first."""
    query = sa.select(VERDICTS.c.digest, VERDICTS.c.payload, VERDICTS.c.at).order_by(VERDICTS.c.id.desc()).limit(limit)
    return query.where(VERDICTS.c.digest.is_not(None)) if published_only else query
