"""Authentication middleware: checks the token before the body is read; revoked or expired tokens end requests."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access import problems
from fedmoe.server.access.security import JOIN_PATH, STORED_BYTES, Principal
from fedmoe.server.access.tokens import TokenGate
from fedmoe.server.access.turns import UPLOADS, Rate, RequestTurn, RequestTurns
from fedmoe.wire.http.body_limits import BodyRefusedError
from fedmoe.wire.http.middleware import is_open


class AuthenticationMiddleware:
    """Asks for a token on everything but the open paths, before a byte of the body is read.

    What is under way with a token ends when it is revoked or expires: with 401, and nothing of it is kept.
    `token_rate` None lets tokens ask as fast as they like; where none is asked for, everybody may.
    """

    def __init__(self, app: ASGIApp, gate: TokenGate, token_rate: Rate | None) -> None:
        self._app = app
        self._gate = gate
        self._turns = RequestTurns(token_rate, time.monotonic)
        self.bodies = BufferedBodies()
        self._under_way: dict[str, set[asyncio.Timeout]] = {}
        gate.on_revoked.append(self._end_later)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_open(scope):
            await self._app(scope, receive, send)
            return
        self._loop = asyncio.get_running_loop()
        address = address_of(scope)
        try:
            principal = self._gate.admit(Headers(scope=scope).get("authorization"), address)
            principal.require_path(scope["path"])
        except RefusedError as error:
            await self._turns.stranger(address)
            await problems.refusal(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["principal"] = principal
        try:
            # Whoever stored the body asked before it came.
            turn = await self._turns.of(principal.token, scope["path"], counted=STORED_BYTES in scope["state"])
            # What is uploaded goes to the disk while it comes.
            body = None if scope["path"] in UPLOADS else self.bodies.of(principal.token)
            try:
                await self._while_usable(principal, scope, _Exchange(receive, send, turn, body))
            finally:
                turn.end()
                if body is not None:
                    body.release()
        except RefusedError as error:
            await problems.refusal(error)(scope, receive, send)

    async def _while_usable(self, principal: Principal, scope: Scope, exchange: _Exchange) -> None:
        # What revokes a token is not stopped by it, nor an exchange that had begun by the end of the line.
        if not principal.token or scope["path"] in ("/tokens/revoke", JOIN_PATH):
            await self._answer(scope, exchange)
            return
        try:
            async with asyncio.timeout(self._gate.seconds_left(principal.token)) as timeout:
                timeouts = self._under_way.setdefault(principal.token, set())
                timeouts.add(timeout)
                try:
                    await self._answer(scope, exchange)
                finally:
                    timeouts.discard(timeout)
                    if not timeouts:
                        self._under_way.pop(principal.token, None)
        except TimeoutError:
            if not timeout.expired():
                raise
            if not exchange.answered:
                raise self._gate.ended(principal.token) from None

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        headers = Headers(scope=scope)
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            await exchange.turn.begin()  # nobody will read a body that is not there
        await self._app(scope, exchange.receive, exchange.send)

    def _end_later(self, token: str) -> None:
        """Called in the thread that revokes."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end, token)

    def _end(self, token: str) -> None:
        now = asyncio.get_running_loop().time()
        for timeout in self._under_way.get(token, ()):
            timeout.reschedule(now)


class _Exchange:
    """A request on its way in and its answer on its way out; in between is its turn."""

    def __init__(self, receive: Receive, send: Send, turn: RequestTurn, body: BufferedBody | None) -> None:
        self._receive = receive
        self._body = body
        self._send = send
        self.turn = turn
        self.answered = False

    async def receive(self) -> Message:
        message = await self._receive()
        if self._body is not None:
            self._body.add(len(message.get("body", b"")))
        if message["type"] == "http.request" and not message.get("more_body", False):
            await self.turn.begin()
        return message

    async def send(self, message: Message) -> None:
        self.answered = True
        self.turn.end()
        await self._send(message)


def address_of(scope: Scope) -> str | None:
    """The address a request comes from: the peer's, which may be a proxy."""
    client = scope.get("client")
    return str(client[0]) if client else None


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
        limits, held_by_token = self._bodies.limits, self._bodies.by_token[self._token]
        if more and self._token and held_by_token + more > limits.of_token:
            raise BodyRefusedError("quota_exceeded", *_no_room("this token's", limits.of_token), retry_after=2)
        if more and self._bodies.total + more > limits.total:
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
