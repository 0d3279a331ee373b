"""Small statistics that workers report: bounded, thinned out with age, read page by page.

Of a worker's held-out losses the newest and the best stay, and the others thin out with age. Statistics of other kinds
are limited per worker, and old ones make room for new ones. All together are limited in bytes.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.security import Principal
from fedmoe.server.statistics.contributors import held_out_of
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.records import Statistic, StoredStatistic, to_row

#: A page has so many rows, and so many bytes, at most; the first row is always in it.
PAGE_ROWS = 1000
PAGE_BYTES = 1 << 20
# What a row takes beside its values.
_OVERHEAD = 512


@dataclass(frozen=True, slots=True)
class StatisticLimits:
    """Bytes of one row; rows and bytes of one worker of an expert; bytes of an expert, and of all.

    `held_out` are the held-out losses of a worker that are kept at most. After `seconds` a row of any other kind makes
    room for a newer one of its worker.
    """

    row: int = 64 << 10
    rows: int = 256
    own: int = 256 << 10
    held_out: int = 128
    expert: int = 8 << 20
    whole: int = 32 << 20
    seconds: float = 3600.0


@dataclass(frozen=True, slots=True)
class _Row:
    """What memory holds of a row; `loss` is a held-out one's, None for other kinds."""

    id: int
    expert: str
    worker: str
    kind: str
    size: int
    at: float
    loss: float | None


class ReportedStatistics:
    """The statistics in a journal; safe to use from any thread."""

    def __init__(self, journal: Journal, limits: StatisticLimits | None = None) -> None:
        self._journal = journal
        self._limits = limits or StatisticLimits()
        self._lock = threading.Lock()
        self._rows: dict[int, _Row] = {}
        self._of: dict[tuple[str, str], dict[int, _Row]] = {}
        self._own: Counter[tuple[str, str]] = Counter()
        self._bytes: Counter[str] = Counter()
        for stored in journal.stored_statistics():
            self._add(_row(stored))
        surplus = {row.id for rows in self._of.values() for row in self._too_dense(rows.values())}
        self._drop(surplus)
        surplus |= set(self._overfull(0))
        if surplus:
            journal.drop_statistics(surplus)

    def add(self, statistic: Statistic) -> None:
        """Store a statistic, in place of older ones where there are too many; refuses too many at once."""
        size = len(to_row(statistic)["payload"]) + _OVERHEAD
        if size > self._limits.row:
            raise RefusedError(
                "too_large",
                f"the values take {size} bytes as JSON; at most {self._limits.row} are kept in one statistic.",
                "Send fewer values, or under shorter names.",
            )
        with self._lock:
            aged = self._aged(statistic, size)
            stored = self._journal.add_statistic(statistic)
            self._add(_row(stored))
            self._drop(aged)
            thinned = {row.id for row in self._too_dense(self._of[statistic.expert, statistic.worker].values())}
            self._drop(thinned)
            dropped = aged | thinned | set(self._overfull(stored.id))
            if dropped:
                self._journal.drop_statistics(dropped)

    def erase(self, expert: str, worker: str) -> int:
        """Delete a worker's statistics of an expert; how many rows."""
        with self._lock:
            ids = set(self._of.get((expert, worker), {}))
            self._drop(ids)
            if ids:
                self._journal.drop_statistics(ids)
        return len(ids)

    def page(
        self,
        principal: Principal,
        expert: str | None = None,
        worker: str | None = None,
        kind: str | None = None,
        after: int = 0,
        limit: int = PAGE_ROWS,
    ) -> tuple[list[StoredStatistic], int | None]:
        """Rows in order from the one after number `after`, of what a token may read; the number to go on from, if any.

        A worker's token reads its own rows of the experts in its scope.
        """
        if expert is not None:
            principal.require_expert(expert)
        if worker is not None:
            principal.require_worker(worker)
        owner = worker or principal.worker

        def readable(row: _Row) -> bool:
            named = expert in (None, row.expert) and owner in (None, row.worker) and kind in (None, row.kind)
            return named and principal.may_use(row.expert)

        with self._lock:
            matching = [row for row in self._rows.values() if row.id > after and readable(row)]
        ids: list[int] = []
        size = 0
        for row in matching[:limit]:
            size += row.size
            if ids and size > PAGE_BYTES:
                break
            ids.append(row.id)
        rows = self._journal.stored_statistics(ids) if ids else []
        return rows, ids[-1] if len(ids) < len(matching) else None

    def _aged(self, statistic: Statistic, size: int) -> set[int]:
        """The worker's rows that make room for a new one; held-out losses are thinned out instead."""
        if held_out_of(statistic) is not None:
            return set()
        limits, now = self._limits, statistic.at
        own = [row for row in self._of.get((statistic.expert, statistic.worker), {}).values() if row.loss is None]
        rows, total = len(own) + 1, sum(row.size for row in own) + size
        aged = set()
        for row in own:
            if rows <= limits.rows and total <= limits.own:
                break
            if now - row.at < limits.seconds:
                raise RefusedError(
                    "too_many_statistics",
                    f"worker {statistic.worker!r} sent {rows - 1} statistics of {statistic.expert}, {total - size} B; "
                    f"at most {limits.rows} and {limits.own} bytes are kept within {limits.seconds:g} seconds.",
                    "Send fewer, or smaller ones.",
                )
            aged.add(row.id)
            rows, total = rows - 1, total - row.size
        return aged

    def _too_dense(self, rows: Iterable[_Row]) -> list[_Row]:
        """Every second held-out loss once there are too many, without the newest and the best: older ones thin out."""
        losses = [row for row in rows if row.loss is not None]
        if len(losses) <= self._limits.held_out:
            return []
        best = min(losses, key=lambda row: math.inf if row.loss is None else row.loss)
        return [row for row in losses[-2::-2] if row is not best]

    def _overfull(self, newest: int) -> Iterator[int]:
        """Rows that go because an expert, or all, have too many bytes: the oldest of whoever sent the most."""
        while over := self._over():
            of_most = max((key for key in self._of if key[0] in over), key=lambda key: (self._own[key], key))
            oldest = next(iter(self._of[of_most]))
            if oldest == newest:
                return
            self._drop({oldest})
            yield oldest

    def _over(self) -> set[str]:
        """The experts whose statistics take too many bytes."""
        if sum(self._bytes.values()) > self._limits.whole:
            return set(self._bytes)
        return {expert for expert, size in self._bytes.items() if size > self._limits.expert}

    def _add(self, row: _Row) -> None:
        self._rows[row.id] = row
        self._of.setdefault((row.expert, row.worker), {})[row.id] = row
        self._own[row.expert, row.worker] += row.size
        self._bytes[row.expert] += row.size

    def _drop(self, ids: Iterable[int]) -> None:
        for number in ids:
            row = self._rows.pop(number)
            key = row.expert, row.worker
            del self._of[key][number]
            self._own[key] -= row.size
            self._bytes[row.expert] -= row.size
            if not self._of[key]:
                del self._of[key], self._own[key]


def _row(stored: StoredStatistic) -> _Row:
    fact, held_out = stored.statistic, held_out_of(stored.statistic)
    loss = held_out.loss if held_out is not None else None
    return _Row(stored.id, fact.expert, fact.worker, fact.kind, stored.size + _OVERHEAD, fact.at, loss)
