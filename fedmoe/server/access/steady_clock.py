"""A wall clock that never goes back, so that expired tokens stay expired."""

from __future__ import annotations

from collections.abc import Callable


class SteadyClock:
    """Seconds since 1970 by the machine's clock `wall`, but never less than the latest time seen.

    While the wall clock is behind, `monotonic` seconds are added to that time, so that what ends later still ends.
    `latest` is what an earlier process had seen.
    """

    def __init__(self, wall: Callable[[], float], monotonic: Callable[[], float], latest: float = 0.0) -> None:
        self._wall = wall
        self._monotonic = monotonic
        # One value, exchanged whole: threads ask too.
        self._seen = (latest, monotonic())

    def now(self) -> float:
        wall, passed = self._wall(), self._monotonic()
        latest, since = self._seen
        steady = latest + (passed - since)
        if wall <= steady:
            return steady
        self._seen = (wall, passed)
        return wall

    @property
    def behind(self) -> float:
        """Seconds by which the machine's clock is behind the latest time seen; 0 as a rule."""
        return max(0.0, self.now() - self._wall())
