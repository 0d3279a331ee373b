"""Contributors: the newest update and held-out loss of every worker of every expert."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pydantic import ValidationError

from fedmoe.federation.events import Event, UpdateAccepted
from fedmoe.server.storage.records import Statistic
from fedmoe.wire.contract.experts import HeldOutInfo, WorkerInfo
from fedmoe.wire.contract.messages import HELD_OUT

#: A worker of which so many updates in a row changed nothing is shown as not learning.
NOT_LEARNING = 5
# Workers whose newest held-out loss is shown; names cost their inventor nothing.
_MOST_LOSSES = 10_000


def held_out_of(statistic: Statistic) -> HeldOutInfo | None:
    """The held-out loss that a statistic reports; None for one of another kind, or that lacks a number."""
    if statistic.kind != HELD_OUT:
        return None
    try:
        return HeldOutInfo.model_validate(dict(statistic.payload))
    except ValidationError:
        return None


class _WorkerRecord(NamedTuple):
    updates: int
    last: UpdateAccepted
    #: So many of the last updates in a row changed nothing, or were the same bytes again.
    idle: int


class Contributors:
    """Counts accepted updates per expert and worker; filled from the journal at start, then by every commit.

    Keeps the newest held-out loss of each.
    """

    def __init__(self, events: Iterable[Event], statistics: Iterable[Statistic] = ()) -> None:
        self._seen: dict[str, dict[str, _WorkerRecord]] = {}
        self._held_out: dict[tuple[str, str], HeldOutInfo] = {}
        self._changes: Counter[str] = Counter()
        self.observe(events)
        for statistic in statistics:
            self.hear(statistic)

    def hear(self, statistic: Statistic) -> None:
        """Note a held-out loss; statistics of other kinds, or that lack a number, are ignored."""
        held_out = held_out_of(statistic)
        if held_out is None:
            return
        key = (statistic.expert, statistic.worker)
        self._held_out.pop(key, None)
        self._held_out[key] = held_out
        self._changes[statistic.expert] += 1
        if len(self._held_out) > _MOST_LOSSES:
            del self._held_out[next(iter(self._held_out))]

    def forget(self, expert: str, worker: str) -> None:
        """Drop a worker's held-out loss, after its erasure."""
        self._held_out.pop((expert, worker), None)
        self._changes[expert] += 1

    def observe(self, events: Iterable[Event]) -> None:
        """Count updates that were journalled just now, or, at a start, all of them."""
        # A new mapping for all of them: readers in other threads go through the one that they have.
        seen: dict[str, dict[str, _WorkerRecord]] = {}
        for event in events:
            if isinstance(event, UpdateAccepted):
                records = seen.get(event.expert)
                if records is None:
                    records = seen[event.expert] = dict(self._seen.get(event.expert, {}))
                before = records.get(event.worker)
                updates, idle = (before.updates, before.idle) if before else (0, 0)
                unchanged = event.info.get("norm") == 0 or (before is not None and before.last.digest == event.digest)
                records[event.worker] = _WorkerRecord(updates + 1, event, idle + 1 if unchanged else 0)
                self._changes[event.expert] += 1
        self._seen |= seen

    def changes(self, expert: str) -> int:
        """A counter that rises with every update or held-out loss of an expert's workers."""
        return self._changes[expert]

    def heard_at(self, expert: str, worker: str) -> float:
        """When the last update of a worker landed, seconds since 1970."""
        return self._seen[expert][worker].last.at

    def newest(self) -> dict[str, float]:
        """When the newest update of each expert landed, seconds since 1970."""
        seen = list(self._seen.items())
        return {expert: max(record.last.at for record in records.values()) for expert, records in seen}

    def count(self, expert: str) -> int:
        """How many workers have ever contributed to an expert."""
        return len(self._seen.get(expert, {}))

    def warnings(self, expert: str, warning: Callable[[str, str], str]) -> tuple[str, ...]:
        """What a `warning` says of each worker of an expert, in name order."""
        return tuple(warning(expert, worker) for worker in sorted(self._seen.get(expert, {})))

    def workers(
        self, expert: str, now: float, held_out: bool = False, warning: Callable[[str, str], str] | None = None
    ) -> list[WorkerInfo]:
        """The workers of one expert in name order; `now` is seconds since 1970.

        With a `warning`, that of an expert's worker is among its flags, beside those that follow from its updates.
        """
        workers = []
        for name, record in sorted(self._seen.get(expert, {}).items()):
            last, flags = record.last, []
            if warning is not None and record.idle >= NOT_LEARNING:
                flags.append(f"not learning: its last {record.idle} updates changed nothing or were the same again")
            if warning is not None and (text := warning(expert, name)):
                flags.append(text)
            info = WorkerInfo(
                worker=last.worker,
                updates=record.updates,
                staleness=last.staleness,
                loss=last.info.get("loss"),
                steps=int(last.info["steps"]) if "steps" in last.info else None,
                tokens=int(last.info["tokens"]) if "tokens" in last.info else None,
                seconds_ago=max(0.0, now - last.at),
                held_out=self._held_out.get((expert, name)) if held_out else None,
                flags=flags,
            )
            workers.append(info)
        return workers
