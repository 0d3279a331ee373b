"""Who contributed what: the last thing heard from every worker of every expert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedmoe.events import Event, UpdateAccepted
from fedmoe.wire.messages import WorkerInfo


@dataclass(frozen=True, slots=True)
class _Seen:
    updates: int
    last: UpdateAccepted


class Roster:
    """Counts accepted updates per expert and worker; filled from the journal at start, then by every commit."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._seen: dict[tuple[str, str], _Seen] = {}
        self.observe(events)

    def observe(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, UpdateAccepted):
                key = (event.expert, event.worker)
                before = self._seen.get(key)
                self._seen[key] = _Seen((before.updates if before else 0) + 1, event)

    def workers(self, expert: str, now: float) -> list[WorkerInfo]:
        """The workers of one expert in name order; `now` is seconds since 1970."""
        return [_info(worker, seen, now) for (name, worker), seen in sorted(self._seen.items()) if name == expert]


def _info(worker: str, seen: _Seen, now: float) -> WorkerInfo:
    info = seen.last.info
    return WorkerInfo(
        worker=worker,
        updates=seen.updates,
        staleness=seen.last.staleness,
        loss=info.get("loss"),
        steps=int(info["steps"]) if "steps" in info else None,
        tokens=int(info["tokens"]) if "tokens" in info else None,
        seconds_ago=max(0.0, now - seen.last.at),
    )
