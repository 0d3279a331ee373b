"""Limits on decoded updates in memory: a byte budget, and a queue for one job at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class MemoryBudget:
    """Bytes that are shared out in one event loop; a wish for more than all of them is met alone."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._left = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def of(self, wanted: int) -> AsyncIterator[None]:
        """Have `wanted` bytes for as long as the context lasts."""
        taken = min(wanted, self._total)
        await self._take(taken)
        try:
            yield
        finally:
            self._left += taken
            self._serve()

    async def _take(self, taken: int) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((taken, turn))
        self._serve()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # had its turn, but is not there to use it
                self._left += taken
            self._serve()
            raise

    def _serve(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self._left):
            taken, turn = self._waiting.popleft()
            if not turn.done():
                self._left -= taken
                turn.set_result(None)


class SerialQueue:
    """Work that takes much memory, done one at a time; of each token one request stands in line, whatever it sends."""

    def __init__(self) -> None:
        self._all = asyncio.Lock()
        self._of: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def turn(self, token: str) -> AsyncIterator[None]:
        async with self._of.setdefault(token, asyncio.Lock()), self._all:
            yield
