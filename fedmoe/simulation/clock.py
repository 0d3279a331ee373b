"""The virtual clock: actions in the order of their moments, as fast as they can be computed."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable

Action = Callable[[], None]


class VirtualClock:
    """Runs actions at moments (seconds from 0); those of one moment in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._planned: list[tuple[float, int, Action]] = []
        self._count = 0

    def at(self, moment: float, action: Action) -> None:
        """Plan an action; one at an infinite moment never comes. Raises ValueError for a moment that is over."""
        if not moment >= self.now:
            raise ValueError(f"it is {self.now} s by the clock; nothing can be planned for {moment}")
        if math.isfinite(moment):
            heapq.heappush(self._planned, (moment, self._count, action))
            self._count += 1

    def run(self, until: float) -> None:
        """Run what is planned, and what that plans, up to and including the moment `until`; then it is that late."""
        while self._planned and self._planned[0][0] <= until:
            self.now, _, action = heapq.heappop(self._planned)
            action()
        self.now = until
