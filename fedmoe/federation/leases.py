"""Leases: only one place at a time may push under a worker's id; each push takes or renews the lease.

A state directory has an epoch. Whoever pushes first under a worker's id holds its lease, and keeps it with every push;
a second epoch is refused meanwhile. When the holder has been silent for long enough, the second takes over, and the
first must stop. All is decided here, on values; times are seconds of a monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedmoe.runtime.errors import RefusedError

#: How long a lease lasts without a push: so many of its holder's usual intervals, within these seconds. A worker that
#: comes back with a new state directory waits no longer than that.
INTERVALS = 2.5
LEAST_SECONDS = 60.0
MOST_SECONDS = 600.0
#: How long a sign that an id is used in two places is shown.
SHOWN_SECONDS = 3600.0
# Earlier holders are refused otherwise than newcomers; so many are remembered.
_MOST_FORMER = 8


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to push under a worker's id: the holder's epoch, the hash of its token, its last push, its duration.

    `token` None is not known: the lease was found in the journal. `former` are epochs that held it before, the newest
    last; `doubled` is when another place last pushed or tried to, None if none did.
    """

    epoch: str
    token: str | None
    seen: float
    seconds: float = LEAST_SECONDS
    former: tuple[str, ...] = ()
    doubled: float | None = None

    def seconds_left(self, now: float) -> float:
        """Seconds until it can be taken over; 0 or less once it is over."""
        return self.seen + self.seconds - now

    def excludes(self, epoch: str, token: str, now: float) -> bool:
        """Whether a push of this epoch must wait. Another token is another person, no second copy of this worker."""
        mine = self.token is None or self.token == token
        return epoch != self.epoch and mine and self.seconds_left(now) > 0

    def tried(self, now: float) -> Lease:
        """After a push from another place."""
        return replace(self, doubled=now)

    def pushed(self, epoch: str, token: str, now: float) -> Lease:
        """After a push of this epoch that was let through."""
        if epoch == self.epoch:
            return replace(self, token=token, seen=now, seconds=_lasting(now - self.seen))
        if self.seconds_left(now) > 0:
            return self.tried(now)
        former = (*(name for name in self.former if name != epoch), self.epoch)[-_MOST_FORMER:]
        doubled = now if epoch in self.former else self.doubled
        return Lease(epoch, token, now, LEAST_SECONDS, former, doubled)

    def refusal(self, worker: str, epoch: str, now: float) -> RefusedError:
        """The refusal of an epoch that the lease excludes: to wait, or to stop if it had the lease before."""
        seconds = max(1, round(self.seconds_left(now)))
        facts = {"seconds_left": seconds, "holder": self.epoch}
        if epoch in self.former:
            return RefusedError(
                "lease_lost",
                f"worker {worker!r} pushes from another place now (epoch {self.epoch}); this one (epoch {epoch}) must "
                "stop.",
                "Stop one of the two, or give it another --worker-id and --state-dir.",
                **facts,
            )
        return RefusedError(
            "lease_held",
            f"worker {worker!r} pushes from another place (epoch {self.epoch}); this one (epoch {epoch}) takes over "
            f"when that has been silent for {seconds} seconds more.",
            "Wait, if the other one was stopped; else stop it, or give this one another --worker-id and --state-dir.",
            **facts,
        )

    def warning(self, now: float) -> str:
        """A warning that the id is used in two places; empty if there is no sign of it."""
        if self.doubled is None or now - self.doubled > SHOWN_SECONDS:
            return ""
        return "its id is used in two places"


def lease_after_restart(epoch: str, interval: float, former: tuple[str, ...], now: float) -> Lease:
    """The lease of whoever pushed last before a restart: a whole one, from now on.

    `interval` is what lay between its last two pushes by the journal's clock, which may have been set since.
    """
    return Lease(epoch, None, now, _lasting(interval), former[-_MOST_FORMER:])


def _lasting(interval: float) -> float:
    return min(MOST_SECONDS, max(LEAST_SECONDS, INTERVALS * interval))
