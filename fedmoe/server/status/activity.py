"""Recent activity of a federation: newest events, rates, losses over time, refusals; first read from the journal."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, fields

from fedmoe.federation.events import Event, ExpertRegistered, UpdateAccepted, UpdateHeld
from fedmoe.wire.contract.experts import HeldOutInfo
from fedmoe.wire.contract.status import EventInfo, LossPoint

#: Rates and mean staleness are of so many seconds.
WINDOW_SECONDS = 300.0
_LEAST_SPAN = 60.0
_MOST_EVENTS = 100
_MOST_POINTS = 240
_MOST_RECENT = 2_000
_MOST_WORKERS = 10_000
_WORDS = 120


#: When, at which version, the loss in training, the held-out loss. Messages are made when somebody asks: a start may
#: read a hundred thousand events.
_Loss = tuple[float, int, float | None, float | None]


@dataclass(slots=True)
class _ExpertActivity:
    #: When the first event of the expert was.
    began: float | None = None
    recent: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=_MOST_RECENT))
    losses: list[_Loss] = field(default_factory=list)

    def add(self, point: _Loss) -> None:
        """Keep a point; of many the older half is thinned out, so that the whole time stays in view."""
        self.losses.append(point)
        if len(self.losses) > _MOST_POINTS:
            half = len(self.losses) // 2
            self.losses = self.losses[:half:2] + self.losses[half:]


class Activity:
    """What happened lately; experts by their first names, times in seconds since 1970. Safe to use from any thread."""

    def __init__(self, stored_bytes: Callable[[], int] = lambda: 0) -> None:
        self._stored_bytes = stored_bytes
        self._lock = threading.Lock()
        self._experts: dict[str, _ExpertActivity] = {}
        self._events: deque[tuple[int, Event]] = deque(maxlen=_MOST_EVENTS)
        self._stored: deque[tuple[float, int]] = deque(maxlen=_MOST_RECENT)
        self._refusals: dict[tuple[str, str], tuple[int, str]] = {}
        self._held: Counter[tuple[str, str]] = Counter()
        #: Rises with every change; the number of the newest event.
        self.revision = 0
        self._id = 0

    def following(self, events: Iterable[Event]) -> Iterator[Event]:
        """The same events, which are noted as they pass."""
        for event in events:
            self._note(event)
            yield event

    def observe(self, events: Iterable[Event]) -> None:
        """Events that were journalled just now."""
        for event in events:
            self._note(event)
            if isinstance(event, UpdateAccepted):
                with self._lock:
                    self._stored.append((event.at, self._stored_bytes()))

    def measured(self, expert: str, at: float, version: int, held_out: HeldOutInfo) -> None:
        """A held-out loss that a worker reports."""
        with self._lock:
            self._of(expert).add((at, version, None, held_out.loss))
            self.revision += 1

    def refused(self, expert: str, worker: str, reason: str) -> None:
        """A push that was refused, in words."""
        with self._lock:
            count, _ = self._refusals.pop((expert, worker), (0, ""))
            self._refusals[expert, worker] = (count + 1, reason)
            self.revision += 1
            if len(self._refusals) > _MOST_WORKERS:
                del self._refusals[next(iter(self._refusals))]

    def refusals(self, expert: str, worker: str) -> tuple[int, str]:
        """How many pushes of a worker were refused since the start, and why the newest one was."""
        return self._refusals.get((expert, worker), (0, ""))

    def held(self, expert: str, worker: str) -> int:
        """How many updates of a worker were ever held."""
        return self._held[expert, worker]

    def rate(self, expert: str, now: float) -> tuple[float, float | None]:
        """Updates a minute and their mean staleness in the last `WINDOW_SECONDS`; None without an update."""
        with self._lock:
            activity = self._of(expert)
            # What lies ahead of a clock that was set back is not of the last minutes.
            recent = [row for row in activity.recent if now - WINDOW_SECONDS < row[0] <= now]
        if not recent:
            return 0.0, None
        return 60.0 * len(recent) / _span(activity.began, now), sum(staleness for _, staleness in recent) / len(recent)

    def losses(self, expert: str) -> list[LossPoint]:
        """Losses over the whole time, the oldest first."""
        with self._lock:
            losses = list(self._of(expert).losses)
        names = ("at", "version", "training", "held_out")
        return [LossPoint.model_validate(dict(zip(names, loss, strict=True))) for loss in losses]

    def bytes_per_hour(self, now: float) -> float:
        """What updates add to the store now."""
        with self._lock:
            recent = [row for row in self._stored if now - WINDOW_SECONDS < row[0] <= now]
        return 3600.0 * (recent[-1][1] - recent[0][1]) / _span(recent[0][0], now) if len(recent) > 1 else 0.0

    def events(self) -> list[EventInfo]:
        """The newest events, the newest first."""
        with self._lock:
            events = list(reversed(self._events))
        return [event_info(number, event) for number, event in events]

    def _of(self, expert: str) -> _ExpertActivity:
        activity = self._experts.get(expert)
        if activity is None:
            activity = self._experts[expert] = _ExpertActivity()
        return activity

    def _note(self, event: Event) -> None:
        with self._lock:
            self._id += 1
            self.revision += 1
            self._events.append((self._id, event))
            # The usual one first: a start notes a hundred thousand.
            if isinstance(event, UpdateAccepted):
                activity = self._of(event.expert)
                activity.recent.append((event.at, event.staleness))
                if (loss := event.info.get("loss")) is not None:
                    activity.add((event.at, event.version, loss, None))
            elif isinstance(event, UpdateHeld):
                self._held[event.expert, event.worker] += 1
            elif isinstance(event, ExpertRegistered):
                self._of(event.expert).began = event.at


def _span(began: float | None, now: float) -> float:
    """Seconds that a rate is of: fewer than the window where less has passed, but never a few moments alone."""
    return min(WINDOW_SECONDS, max(_LEAST_SPAN, now - (now if began is None else began)))


_KINDS = {"ExpertRegistered": "registered", "UpdateAccepted": "landed", "UpdateHeld": "held"}
# Fields of events that are shown, in this order.
_SHOWN = ("version", "to_version", "staleness", "name", "reason", "number")


def event_info(number: int, event: Event) -> EventInfo:
    """An event in a few words."""
    name = type(event).__name__
    kind = _KINDS.get(name) or "".join(f" {char.lower()}" if char.isupper() else char for char in name).strip()
    words = [f"{key.replace('_', ' ')} {getattr(event, key)}" for key in _SHOWN if _told(event, key)]
    return EventInfo(
        id=number,
        at=event.at,
        kind=kind,
        expert=str(getattr(event, "expert", "")),
        worker=str(getattr(event, "worker", "")),
        text=", ".join(words)[:_WORDS],
    )


def _told(event: Event, key: str) -> bool:
    has = any(part.name == key for part in fields(event))
    return has and getattr(event, key) not in ("", None) and not isinstance(event, ExpertRegistered)
