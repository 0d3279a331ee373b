"""Size caps and deadlines of request bodies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmoe.runtime.errors import RefusedError

#: No body may pause longer than this, or stay longer behind `MIN_BYTES_PER_SECOND`.
IDLE_SECONDS = 20.0
MIN_BYTES_PER_SECOND = 16 << 10
MAX_JSON_BYTES = 4 << 20
#: Whoever is refused while still sending gets this long to read the answer before the connection closes.
LINGER_SECONDS = 2.0


class BodyGuard:
    """Bodies with a cap and a deadline, and no connection kept whose body nobody reads.

    `caps` gives paths with a cap of their own in bytes, None for a route that sets it itself; elsewhere a body is JSON
    and has at most `MAX_JSON_BYTES`. FastAPI's `max_body_size` is not used: it turns a 401 for a large body into a 413.
    """

    def __init__(self, app: ASGIApp, caps: Mapping[str, int | None]) -> None:
        self._app = app
        self._caps = caps

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = _BoundedBody(Headers(scope=scope), self._caps.get(scope["path"], MAX_JSON_BYTES), receive, send)
        await self._app(scope, body.receive, body.send)


class BodyRefusedError(RefusedError, HTTPException):
    """A refusal that FastAPI lets out of its reading of a body; any other error there becomes a plain 400."""


class _BoundedBody:
    """One request's body on its way in and the answer on its way out."""

    def __init__(self, headers: Headers, cap: int | None, receive: Receive, send: Send) -> None:
        length = headers.get("content-length", "")
        self._declared = int(length) if length.isdecimal() else 0
        self._cap = cap
        self._receive = receive
        self._send = send
        self._complete = self._declared == 0 and "transfer-encoding" not in headers
        self._answered = self._given_up = False
        self._size, self._waited = 0, 0.0

    async def receive(self) -> Message:
        """The next message; raises a refusal for a body that is too large or too slow."""
        if self._complete or self._answered:
            return await self._receive()
        if self._cap is not None and self._declared > self._cap:
            raise _too_large(self._declared, self._cap)
        message = await self._in_time()
        self._size += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._cap is not None and self._size > self._cap:
            raise _too_large(self._size, self._cap)
        return message

    async def _in_time(self) -> Message:
        loop = asyncio.get_running_loop()
        # Only the time spent waiting for the sender counts: a slow disk here must not cut off anybody.
        seconds = IDLE_SECONDS + self._size / MIN_BYTES_PER_SECOND - self._waited
        started = loop.time()
        try:
            async with asyncio.timeout(min(IDLE_SECONDS, seconds)):
                message = await self._receive()
        except TimeoutError:
            self._given_up = True
            raise BodyRefusedError(
                "too_slow",
                f"the body stopped at {self._size} bytes; at least {MIN_BYTES_PER_SECOND} bytes/s are needed.",
                "Send it again over a better connection, an update with a smaller --wire-dtype.",
            ) from None
        self._waited += loop.time() - started
        return message

    async def send(self, message: Message) -> None:
        """Pass the answer on; one that comes before the body has ended also ends the connection, politely."""
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if message["type"] == "http.response.start":
            self._answered = True
            if not self._complete:
                headers = [(name, value) for name, value in message.get("headers", []) if name != b"connection"]
                message = {**message, "headers": [*headers, (b"connection", b"close")]}
        elif last and not self._complete and not self._given_up:
            await self._send({**message, "more_body": True})
            await self._drain()
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self._send(message)

    async def _drain(self) -> None:
        """Throw away what still comes: closing with unread bytes would reset the connection and lose the answer."""
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while (message := await self._receive())["type"] == "http.request" and message.get("more_body", False):
                    pass
        except TimeoutError:
            return


def _too_large(size: int, cap: int) -> RefusedError:
    return BodyRefusedError(
        "too_large", f"the body has {size} bytes or more; at most {cap} are read here.", "Send less in one request."
    )
