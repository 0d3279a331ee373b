"""Live status for pages: made once for all that may see the same, at most twice a second, while one is open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from starlette.concurrency import run_in_threadpool

from fedmoe.server.access.security import Principal
from fedmoe.wire.contract.status import StatusInfo

#: The least time between two messages, and the longest time without one: what workers do changes by time too.
LEAST_SECONDS = 0.5
MOST_SECONDS = 5.0
# Making a message may take this share of the time.
_SHARE = 0.05

Scope = tuple[bool, str | None, tuple[str, ...] | None]


@dataclass(frozen=True, slots=True)
class LiveMessage:
    """A status as a server-sent event; `id` is that of its moment."""

    id: str
    text: bytes


@dataclass
class _View:
    """What everybody of one scope sees."""

    principal: Principal
    readers: int = 0
    newest: LiveMessage | None = None


class LiveStatus:
    """Streams of the status; for one event loop. `make` gives the status for a principal, `revision` rises with it."""

    def __init__(self, make: Callable[[Principal], StatusInfo], revision: Callable[[], int]) -> None:
        self._make = make
        self._revision = revision
        self._views: dict[Scope, _View] = {}
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        #: Messages that were made since the start.
        self.made = 0

    def close(self) -> None:
        """End all streams, now and from now on; from any thread."""
        self._closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    async def stream(self, principal: Principal, last_id: str | None) -> AsyncIterator[bytes]:
        """The status now, unless `last_id` is of it, and again whenever it changes.

        Who reads slowly is given the newest when it has read the one before; none in between is kept for it.
        """
        self._loop = asyncio.get_running_loop()
        key = (principal.role in ("admin", "viewer"), principal.worker, principal.experts)
        view = self._views.setdefault(key, _View(principal))
        view.readers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        try:
            yield b"retry: 1000\n\n"
            while not self._closed:
                changed, newest = self._changed, view.newest
                if newest is not None and newest.id != last_id:
                    last_id = newest.id
                    yield newest.text
                else:
                    await changed.wait()
        finally:
            view.readers -= 1
            if not view.readers:
                self._views.pop(key, None)

    async def _run(self) -> None:
        revision, made_at = -1, 0.0
        while self._views and not self._closed:
            fresh = any(view.newest is None for view in self._views.values())
            now = time.monotonic()
            pause = LEAST_SECONDS
            if fresh or self._revision() != revision or now - made_at >= MOST_SECONDS:
                revision, made_at = self._revision(), now
                for view in list(self._views.values()):
                    view.newest = await run_in_threadpool(self._message, view.principal)
                    self.made += 1
                self._wake()
                pause = max(LEAST_SECONDS, (time.monotonic() - now) / _SHARE)
            await asyncio.sleep(pause)

    def _message(self, principal: Principal) -> LiveMessage:
        status = self._make(principal)
        moment = f"{status.incarnation}-{status.revision}-{status.at:.3f}"
        return LiveMessage(moment, f"id: {moment}\ndata: {status.model_dump_json()}\n\n".encode())

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
