"""Heartbeats: what every worker last said of itself and the newest lines of its log, in memory, bounded."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from fedmoe.wire.contract.status import Heartbeat, WorkerState

#: A worker is silent after so many of the intervals that it announced, and not before these seconds.
SILENT_INTERVALS = 3.0
LEAST_SILENT_SECONDS = 5.0
#: Lines that are kept of a worker's log.
KEPT_LINES = 200
_MOST_WORKERS = 10_000


@dataclass(slots=True)
class _Record:
    heartbeat: Heartbeat
    at: float
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    #: The number of the line after the newest one, as the worker counts and as it is counted here.
    sent: int = 0
    following: int = 0


class Heartbeats:
    """The newest heartbeat of every worker of every expert, experts by their first names; times in seconds."""

    def __init__(self) -> None:
        self._records: dict[tuple[str, str], _Record] = {}
        #: Rises with every heartbeat.
        self.count = 0

    def hear(self, heartbeat: Heartbeat, now: float) -> None:
        """Take a heartbeat; lines that were sent before, or by an earlier start of the worker, are told apart."""
        key = (heartbeat.expert, heartbeat.worker)
        record = self._records.pop(key, None) or _Record(heartbeat, now)
        self._records[key] = record  # the newest is last
        record.heartbeat, record.at = heartbeat, now
        # A worker that starts anew counts from 0 again; one whose answer was lost sends lines once more.
        repeated = record.sent - heartbeat.first_line if heartbeat.first_line else 0
        fresh = heartbeat.lines[max(0, repeated) :]
        record.lines.extend(fresh)
        record.following += len(fresh)
        record.sent = heartbeat.first_line + len(heartbeat.lines)
        self.count += 1
        if len(self._records) > _MOST_WORKERS:
            del self._records[next(iter(self._records))]

    def forget(self, expert: str, worker: str) -> None:
        """Drop a worker that was withdrawn."""
        self._records.pop((expert, worker), None)

    def by_expert(self, now: float) -> dict[str, dict[str, tuple[Heartbeat, float]]]:
        """By expert and worker: the newest heartbeat, and when it came."""
        grouped: dict[str, dict[str, tuple[Heartbeat, float]]] = {}
        for (expert, worker), record in list(self._records.items()):
            # The clock was set back: silence counts from here, not from when the clock is there again.
            record.at = min(record.at, now)
            grouped.setdefault(expert, {})[worker] = (record.heartbeat, record.at)
        return grouped

    def state(self, expert: str, worker: str, now: float) -> WorkerState | None:
        """What a worker is doing; None for one that has sent no heartbeat."""
        heard = self.by_expert(now).get(expert, {}).get(worker)
        return None if heard is None else state_of(*heard, now)

    def lines(self, expert: str, worker: str, after: int) -> tuple[list[str], int]:
        """The lines from number `after` on, as far as they are there, and the number to ask from next."""
        record = self._records.get((expert, worker))
        if record is None:
            return [], 0
        first = record.following - len(record.lines)
        return list(record.lines)[max(0, after - first) :], record.following


def state_of(heartbeat: Heartbeat, at: float, now: float) -> WorkerState:
    """The state of a worker whose newest heartbeat came at `at`."""
    if heartbeat.state == "left":
        return "left"
    patience = max(SILENT_INTERVALS * heartbeat.interval, LEAST_SILENT_SECONDS)
    return "silent" if now - at > patience else heartbeat.state
