"""Limits on JSON bodies held in memory: bytes per token, and in total."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fedmoe.wire.http.body_limits import BodyRefusedError


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Bytes held of one token, and in all; the first `free` bytes of a body count for neither, and always find room."""

    of_token: int = 16 << 20
    total: int = 64 << 20
    free: int = 64 << 10


class BufferedBodies:
    """The JSON bodies in memory that are not answered yet; for one event loop."""

    def __init__(self, limits: BodyLimits | None = None) -> None:
        self.limits = limits or BodyLimits()
        self.by_token: Counter[str] = Counter()
        self.total = 0

    def of(self, token: str) -> BufferedBody:
        """A new body of this token; an empty token stands for all callers and is limited by the total only."""
        return BufferedBody(self, token)


class BufferedBody:
    """One body, as much of it as has come; what it holds is given back with `release`."""

    def __init__(self, bodies: BufferedBodies, token: str) -> None:
        self._bodies = bodies
        self._token = token
        self._size = self._counted = 0

    def add(self, size: int) -> None:
        """More of it comes; raises `RefusedError` where there is no room for that."""
        self._size += size
        more = max(0, self._size - self._bodies.limits.free) - self._counted
        if not more:
            return
        limits, mine = self._bodies.limits, self._bodies.by_token[self._token]
        if self._token and mine + more > limits.of_token:
            raise BodyRefusedError("quota_exceeded", *_no_room("this token's", limits.of_token), retry_after=2)
        if self._bodies.total + more > limits.total:
            raise BodyRefusedError("busy", *_no_room("all", limits.total), retry_after=2)
        self._count(more)

    def release(self) -> None:
        self._count(-self._counted)

    def _count(self, more: int) -> None:
        self._counted += more
        self._bodies.total += more
        self._bodies.by_token[self._token] += more
        if not self._bodies.by_token[self._token]:
            del self._bodies.by_token[self._token]


def _no_room(whose: str, most: int) -> tuple[str, str]:
    """What is wrong, and what to do."""
    detail = f"{whose} requests under way hold {most} bytes of JSON, which is all they may."
    return detail, "Retry after the time given, with fewer or smaller bodies at once."
