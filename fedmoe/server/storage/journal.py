"""The journal: an append-only, durable log of events, and the small tables that must survive with it."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import sqlalchemy as sa

from fedmoe.federation.events import Event, UpdateAccepted
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.event_rows import event_of
from fedmoe.server.storage.records import (
    DataStatistic,
    GatewayVerdict,
    Statistic,
    StoredStatistic,
    TokenFacts,
    TokenRecord,
    of_row,
    to_row,
)
from fedmoe.server.storage.tables import (
    DATA_STATISTICS,
    EVENTS,
    INCARNATIONS_BEFORE,
    META,
    SNAPSHOTS,
    STATISTICS,
    TOKEN_FACTS,
    TOKENS,
    VERDICTS,
)

# Rows that one statement names; SQLite takes 32,766 parameters.
_MOST_NAMED = 10_000
# Rows that one statement reads of a table that has no bound.
_PAGE = 10_000


class DuplicateEventError(Exception):
    """An event whose identity is already in the journal; the whole batch was refused."""


class UnstorableError(RefusedError):
    """A value that the back end cannot hold; the whole batch was refused, and it is not known whose value it was."""

    def __init__(self, reason: str) -> None:
        super().__init__("invalid_request", f"the journal cannot hold a value: {reason}.", "Nothing was stored.")


class NotOwnerError(Exception):
    """This process is no longer the one that may write; nothing was written, and what it has in memory may be old."""


@dataclass(frozen=True, slots=True)
class FormerIncarnation:
    """An incarnation that another one followed, and how many events the journal held then."""

    incarnation: str
    events: int


class Journal(ABC):
    """The order of everything that happened, and the small tables that must survive with it.

    A back end says how events are appended and statements are run: whatever changes something is durable when the call
    returns, all of it or nothing. Nothing in the log is ever changed; rollback and retraction are events too.
    """

    @abstractmethod
    def append(self, events: Sequence[Event], version_digests: Sequence[str | None] | None = None) -> None:
        """Make events durable, all or none; raises `DuplicateEventError` if one is there already.

        `version_digests` are the content hashes of the weights that each of them leaves behind, where known.
        """

    @abstractmethod
    def events(self, expert: str | None = None, after_version: int = -1) -> Iterator[Event]:
        """All events in order, or those of one expert that made later versions than `after_version`."""

    @abstractmethod
    def query(self, statement: sa.Executable) -> list[sa.RowMapping]:
        """The rows that a statement selects."""

    @abstractmethod
    def insert(self, table: sa.Table, row: dict[str, object]) -> int:
        """Add a row; the number it gets."""

    @abstractmethod
    def put(self, table: sa.Table, rows: list[dict[str, object]]) -> None:
        """Add rows, each in the place of the one with its primary key."""

    @abstractmethod
    def delete(self, statement: sa.Delete) -> None:
        """Remove rows of a small table."""

    @abstractmethod
    def begin_incarnation(self) -> str:
        """The history goes on as another one, whose name is returned; the one before is kept with its events' count."""

    @abstractmethod
    def forget_log(self) -> None:
        """Empty what the back end keeps beside the tables, so that nothing is left of rows that were removed."""

    @abstractmethod
    def close(self) -> None:
        """Give the journal back; nothing may be called after it."""

    def version_digest(self, expert: str, version: int) -> str | None:
        """The content hash that the weights of an expert's version had; None where it is not known.

        It is not for version 0, and for what was journalled by schema 1.
        """
        query = sa.select(EVENTS.c.version_digest).where(EVENTS.c.expert == expert, EVENTS.c.version == version)
        rows = self.query(query)
        return rows[0]["version_digest"] if rows else None

    def count(self) -> int:
        query = sa.select(sa.func.count().label("events")).select_from(EVENTS)
        return int(self.query(query)[0]["events"])

    def find_update(self, worker: str, epoch: str, sequence: int) -> UpdateAccepted | None:
        query = sa.select(EVENTS.c.payload).where(
            EVENTS.c.worker == worker, EVENTS.c.epoch == epoch, EVENTS.c.sequence == sequence
        )
        for row in self.query(query):
            event = event_of("update", row["payload"])
            assert isinstance(event, UpdateAccepted)
            return event
        return None

    def add_snapshot(self, expert: str, version: int, digest: str) -> None:
        self.put(SNAPSHOTS, [{"expert": expert, "version": version, "digest": digest}])

    def snapshots(self, expert: str) -> dict[int, str]:
        """Version -> digest of the snapshots of one expert."""
        query = sa.select(SNAPSHOTS.c.version, SNAPSHOTS.c.digest).where(SNAPSHOTS.c.expert == expert)
        return {row["version"]: row["digest"] for row in self.query(query)}

    def drop_snapshot(self, expert: str, version: int) -> None:
        """Take a snapshot's name away; its blob stays."""
        self.delete(SNAPSHOTS.delete().where(SNAPSHOTS.c.expert == expert, SNAPSHOTS.c.version == version))

    def named_elsewhere(self, expert: str, digests: Collection[str]) -> set[str]:
        """Those of `digests` that an update or snapshot of another expert names."""
        tables = (EVENTS, SNAPSHOTS)
        queries = [sa.select(table.c.digest).where(table.c.expert != expert).distinct() for table in tables]
        return {row["digest"] for query in queries for row in self.query(query)} & set(digests)

    def named_blobs(self) -> Iterator[str]:
        """The digests in every table's column of that name. Those of held updates stand in their payloads only."""
        last: int | None = 0
        while last is not None:
            page = sa.select(EVENTS.c.id, EVENTS.c.digest).where(EVENTS.c.id > last).order_by(EVENTS.c.id).limit(_PAGE)
            rows = self.query(page)
            yield from (row["digest"] for row in rows if row["digest"] is not None)
            last = rows[-1]["id"] if len(rows) == _PAGE else None
        for table in (SNAPSHOTS, DATA_STATISTICS, VERDICTS):
            rows = self.query(sa.select(table.c.digest).where(table.c.digest.is_not(None)))
            yield from (row["digest"] for row in rows)

    def add_statistic(self, statistic: Statistic) -> StoredStatistic:
        row = to_row(statistic)
        return StoredStatistic(self.insert(STATISTICS, row), statistic, len(row["payload"]))

    def stored_statistics(self, ids: Collection[int] | None = None) -> list[StoredStatistic]:
        """Reported statistics in order, those with these numbers if any are given."""
        query = sa.select(STATISTICS).order_by(STATISTICS.c.id)
        rows = self.query(query if ids is None else query.where(STATISTICS.c.id.in_(ids)))
        return [StoredStatistic(row["id"], of_row(Statistic, row), len(row["payload"])) for row in rows]

    def statistics(self) -> list[Statistic]:
        """All reported statistics, in order."""
        return [stored.statistic for stored in self.stored_statistics()]

    def drop_statistics(self, ids: Collection[int]) -> None:
        ordered = sorted(ids)
        for start in range(0, len(ordered), _MOST_NAMED):
            self.delete(STATISTICS.delete().where(STATISTICS.c.id.in_(ordered[start : start + _MOST_NAMED])))

    def add_data_statistic(self, statistic: DataStatistic) -> None:
        self.insert(DATA_STATISTICS, to_row(statistic))

    def data_statistics(self) -> list[DataStatistic]:
        """All there ever were, in order."""
        rows = self.query(sa.select(DATA_STATISTICS).order_by(DATA_STATISTICS.c.id))
        return [of_row(DataStatistic, row) for row in rows]

    def add_verdict(self, verdict: GatewayVerdict) -> None:
        self.insert(VERDICTS, to_row(verdict))

    def verdicts(self, limit: int, published_only: bool = False) -> list[GatewayVerdict]:
        """The newest first."""
        query = sa.select(VERDICTS).order_by(VERDICTS.c.id.desc()).limit(limit)
        query = query.where(VERDICTS.c.digest.is_not(None)) if published_only else query
        return [of_row(GatewayVerdict, row) for row in self.query(query)]

    def put_token(self, token: TokenRecord) -> None:
        """Keep what a token may do, in the place of what was known of it."""
        self.put(TOKENS, [to_row(token)])

    def tokens(self) -> list[TokenRecord]:
        return [of_row(TokenRecord, row) for row in self.query(sa.select(TOKENS))]

    def put_token_facts(self, facts: Sequence[TokenFacts]) -> None:
        """Keep facts of tokens, in the place of what was known of them."""
        if facts:
            self.put(TOKEN_FACTS, [to_row(token) for token in facts])

    def token_facts(self) -> list[TokenFacts]:
        return [of_row(TokenFacts, row) for row in self.query(sa.select(TOKEN_FACTS))]

    def meta(self, key: str) -> str | None:
        rows = self.query(sa.select(META.c.value).where(META.c.key == key))
        return rows[0]["value"] if rows else None

    def set_meta(self, key: str, value: str) -> None:
        self.put(META, [{"key": key, "value": value}])

    def metas(self, beginning: str) -> dict[str, str]:
        """The values of all keys that begin so, by the rest of the key."""
        rows = self.query(sa.select(META).where(META.c.key.startswith(beginning, autoescape=True)))
        return {row["key"].removeprefix(beginning): row["value"] for row in rows}

    def former_incarnations(self) -> list[FormerIncarnation]:
        """The incarnations before this one, the oldest first."""
        return [FormerIncarnation(**former) for former in json.loads(self.meta(INCARNATIONS_BEFORE) or "[]")]
