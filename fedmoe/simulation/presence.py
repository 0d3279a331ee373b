"""When a worker is online: from joining to leaving, except during outages."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A transfer over a link: when it is through (infinite: never), and how often it was cut off before."""

    end: float
    cut_off: int


@dataclass(frozen=True)
class Presence:
    """From `joins` to `leaves`, without the `outages`: intervals [start, end) that rise and do not overlap."""

    joins: float = 0.0
    leaves: float = math.inf
    outages: tuple[Interval, ...] = ()
    _starts: tuple[float, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", tuple(start for start, _ in self.outages))

    def is_there(self, moment: float) -> bool:
        """Whether the worker is on at this moment."""
        last = bisect_right(self._starts, moment) - 1
        return self.joins <= moment < self.leaves and (last < 0 or moment >= self.outages[last][1])

    def windows(self, since: float) -> Iterator[Interval]:
        """The intervals in which the worker is on from `since` on."""
        start = max(since, self.joins)
        for off, on in self.outages[max(bisect_right(self._starts, start) - 1, 0) :]:
            if on <= start:
                continue
            if start < min(off, self.leaves):
                yield start, min(off, self.leaves)
            start = max(start, on)
        if start < self.leaves:
            yield start, self.leaves

    def worked(self, since: float, until: float) -> float:
        """Seconds in which the worker is on between two moments."""
        total = 0.0
        for start, end in self.windows(since):
            if start >= until:
                break
            total += min(end, until) - start
        return total

    def after(self, since: float, seconds: float) -> float:
        """The moment at which so many seconds of being on have passed since; infinite if the worker leaves before."""
        remaining = seconds
        for start, end in self.windows(since):
            if remaining <= end - start:
                return start + remaining
            remaining -= end - start
        return math.inf

    def transfer(self, since: float, seconds: float) -> Transfer:
        """A transfer that takes so many seconds in one piece; after an outage it begins anew."""
        cut_off = 0
        for start, end in self.windows(since):
            if seconds <= end - start:
                return Transfer(start + seconds, cut_off)
            cut_off += 1
        return Transfer(math.inf, cut_off)
