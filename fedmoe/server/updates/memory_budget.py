"""How many bytes of decoded updates there may be at once; whoever does not fit waits, first come, first served."""

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
