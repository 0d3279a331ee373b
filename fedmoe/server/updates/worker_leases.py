"""Leases of worker ids of a running coordinator: asked before a push, restored from the journal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import structlog

from fedmoe.federation.events import Event, UpdateAccepted
from fedmoe.federation.leases import Lease, lease_after_restart
from fedmoe.wire.contract.messages import UpdateHeader

_log = structlog.get_logger("fedmoe.coordinator")


@dataclass(slots=True)
class _PushHistory:
    """What the journal says of who pushes under a worker's id."""

    epoch: str
    at: float
    interval: float = 0.0
    former: tuple[str, ...] = ()


class WorkerLeases:
    """Leases by expert and worker, since a worker of several experts has a state directory for each.

    `clock` is in seconds and never set. Used by the event loop alone, but for `warning` and
    `active`.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._leases: dict[tuple[str, str], Lease] = {}

    def following(self, events: Iterable[Event]) -> Iterator[Event]:
        """The same events; once they are over, whoever pushed last has the lease."""
        histories: dict[tuple[str, str], _PushHistory] = {}
        for event in events:
            if isinstance(event, UpdateAccepted) and "held" not in event.info:
                key = (event.expert, event.worker)
                history = histories.get(key)
                if history is None:
                    histories[key] = _PushHistory(event.epoch, event.at)
                elif history.epoch == event.epoch:
                    history.interval, history.at = event.at - history.at, event.at
                else:
                    former = (*(epoch for epoch in history.former if epoch != event.epoch), history.epoch)
                    histories[key] = _PushHistory(event.epoch, event.at, former=former)
            yield event
        now = self._clock()
        for key, history in histories.items():
            self._leases[key] = lease_after_restart(history.epoch, history.interval, history.former, now)

    def check(self, header: UpdateHeader, token: str) -> None:
        """Refuse a push from a second place while the first one pushes; before its body is read."""
        key, now = (header.expert, header.worker), self._clock()
        lease = self._leases.get(key)
        if lease is not None and lease.excludes(header.epoch, token, now):
            self._leases[key] = lease.tried(now)
            raise lease.refusal(header.worker, header.epoch, now)

    def pushed(self, header: UpdateHeader, token: str) -> None:
        """Extend the lease after a push of this epoch was answered."""
        key, now = (header.expert, header.worker), self._clock()
        before = self._leases.get(key)
        lease = before.pushed(header.epoch, token, now) if before else Lease(header.epoch, token, now)
        if lease.warning(now) and not (before and before.warning(now)):
            _log.warning("two_places", expert=header.expert, worker=header.worker, epoch=header.epoch)
        self._leases[key] = lease

    def cloned(self, header: UpdateHeader) -> None:
        """Note that two pushes had one number and different bytes: the state directory was copied."""
        key, now = (header.expert, header.worker), self._clock()
        if key in self._leases:
            self._leases[key] = self._leases[key].tried(now)

    def active(self) -> Counter[str]:
        """Workers by expert whose lease is not over; those that have not pushed since a restart do not count."""
        now = self._clock()
        leases = list(self._leases.items())
        return Counter(
            expert for (expert, _), lease in leases if lease.token is not None and lease.seconds_left(now) > 0
        )

    def warning(self, expert: str, worker: str) -> str:
        """That the worker's id is used in two places, in words; empty if there is no sign of it."""
        lease = self._leases.get((expert, worker))
        return lease.warning(self._clock()) if lease is not None else ""
