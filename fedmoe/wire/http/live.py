"""Server-sent events of a state: made once for all readers who may see the same, at most twice a second."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar, cast

from starlette.requests import Request
from starlette.responses import StreamingResponse

EVENTS = "text/event-stream"
#: Marks, in the state of a request, an answer that goes on until its reader leaves or the server stops.
WITHOUT_END = "without_end"
#: The least time between two messages.
LEAST_SECONDS = 0.5
# Proxies cut connections that say nothing for a minute.
_KEEP_ALIVE_SECONDS = 15.0
_RETRY = b"retry: 1000\n\n"
_KEEP_ALIVE = b":\n\n"

ViewT = TypeVar("ViewT", bound=Hashable)
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class LiveState:
    """A state as one line of text; readers that have the one with this `id` are not sent it again."""

    id: str
    text: str


@dataclass
class _View:
    """What everybody of one view sees; `event` is the newest state as it is sent."""

    readers: int = 0
    id: str | None = None
    event: bytes = b""


class LiveStates(Generic[ViewT]):
    """Streams of states by view (who sees the same); for one event loop.

    `make` gives the state of a view, `revision` changes with it; both run in a thread. What changes by time alone is
    made again after `oldest` seconds. Making states may take the `share` of the time.
    """

    def __init__(
        self,
        make: Callable[[ViewT], LiveState],
        revision: Callable[[], Hashable],
        oldest: float = math.inf,
        share: float = 0.05,
    ) -> None:
        self._make, self._revision, self._oldest, self._share = make, revision, oldest, share
        self._views: dict[ViewT, _View] = {}
        self._changed = asyncio.Event()
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        #: States that were made since the start.
        self.made = 0

    def close(self) -> None:
        """End all streams, now and from now on; from any thread."""
        self._closed = True
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def response(self, request: Request, view: ViewT) -> StreamingResponse:
        """The answer to a request for a view's states, which goes on where the reader was."""
        # Proxies that gather answers would keep each event until there are many.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no", "X-Content-Type-Options": "nosniff"}
        setattr(request.state, WITHOUT_END, True)
        stream = self.stream(view, request.headers.get("last-event-id"))
        return StreamingResponse(stream, headers=headers, media_type=EVENTS)

    async def stream(self, view: ViewT, last_id: str | None) -> AsyncIterator[bytes]:
        """The state now, unless `last_id` is its, and again whenever it changes.

        Who reads slowly is given the newest when it has read the one before; none in between is kept for it. Raises
        what making a state raised, so that readers come again.
        """
        self._loop = asyncio.get_running_loop()
        shown = self._views.setdefault(view, _View())
        shown.readers += 1
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        task = self._task
        self._asked.set()
        try:
            yield _RETRY
            while not self._closed:
                changed = self._changed
                if shown.id is not None and shown.id != last_id:
                    last_id = shown.id
                    yield shown.event
                elif task.done():
                    task.result()
                    return
                elif not await _is_set(changed, _KEEP_ALIVE_SECONDS):
                    yield _KEEP_ALIVE
        finally:
            shown.readers -= 1
            if not shown.readers:
                self._views.pop(view, None)

    async def _run(self) -> None:
        revision: Hashable = None
        made_at = -math.inf
        try:
            while self._views and not self._closed:
                self._asked.clear()
                began = time.monotonic()
                newest = await _in_daemon_thread(self._revision)
                if newest != revision or began - made_at >= self._oldest:
                    # The revision is from before the reading: what comes in between is read again.
                    revision, made_at = newest, began
                    await self._remake(list(self._views))
                else:
                    await self._remake([view for view, shown in self._views.items() if shown.id is None])
                spent = time.monotonic() - began
                await asyncio.sleep(LEAST_SECONDS)
                # Who comes meanwhile and whose view nobody saw before does not wait for the rest of the pause.
                await _is_set(self._asked, spent / self._share - LEAST_SECONDS)
        finally:
            self._wake()

    async def _remake(self, views: list[ViewT]) -> None:
        for view in views:
            state = await _in_daemon_thread(partial(self._make, view))
            self.made += 1
            if shown := self._views.get(view):
                shown.id, shown.event = state.id, f"id: {state.id}\ndata: {state.text}\n\n".encode()
        if views:
            self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


async def _in_daemon_thread(call: Callable[[], ResultT]) -> ResultT:
    """The result of a call in a thread that no stop waits for: to make a state may take many seconds."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[ResultT] = loop.create_future()

    def settle(value: ResultT | None, error: Exception | None) -> None:
        if result.cancelled():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(cast(ResultT, value))

    def run() -> None:
        value, problem = None, None
        try:
            value = call()
        except Exception as error:
            problem = error
        with suppress(RuntimeError):  # the loop has ended, and whoever waited with it
            loop.call_soon_threadsafe(settle, value, problem)

    threading.Thread(target=run, name="fedmoe-live", daemon=True).start()
    return await result


async def _is_set(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event at most so long."""
    try:
        await asyncio.wait_for(event.wait(), max(0.0, seconds))
    except TimeoutError:
        return False
    return True
