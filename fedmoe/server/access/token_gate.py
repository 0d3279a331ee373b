"""Authentication middleware: checks the token before the body is read; revoked or expired tokens end requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access import problems
from fedmoe.server.access.buffered_bodies import BufferedBodies, BufferedBody
from fedmoe.server.access.quotas import Rate
from fedmoe.server.access.security import Principal
from fedmoe.server.access.tokens import TokenGate
from fedmoe.server.access.turns import TOKEN_RATE, UPLOADS, RequestTurn, RequestTurns
from fedmoe.wire.http.middleware import is_open


class AuthenticationMiddleware:
    """Asks for a token on everything but the open paths, before a byte of the body is read.

    What is under way with a token ends when it is revoked or expires: with 401, and nothing of it is kept.
    `token_rate` None lets tokens ask as fast as they like; where none is asked for, everybody may.
    """

    def __init__(
        self,
        app: ASGIApp,
        gate: TokenGate,
        token_rate: Rate | None = TOKEN_RATE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app = app
        self._gate = gate
        self._turns = RequestTurns(token_rate, clock)
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
        except RefusedError as error:
            await self._turns.stranger(address)
            await problems.refusal(error)(scope, receive, send)
            return
        scope.setdefault("state", {})["principal"] = principal
        try:
            turn = await self._turns.of(principal.token, scope["path"])
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
        # What revokes a token is not stopped by it.
        if not principal.token or scope["path"] == "/tokens/revoke":
            await self._answer(scope, exchange)
            return
        try:
            async with asyncio.timeout(self._gate.seconds_left(principal.token)) as leash:
                with self._leashed(principal.token, leash):
                    await self._answer(scope, exchange)
        except TimeoutError:
            if not leash.expired():
                raise
            if not exchange.answered:
                raise self._gate.ended(principal.token) from None

    async def _answer(self, scope: Scope, exchange: _Exchange) -> None:
        headers = Headers(scope=scope)
        if headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers:
            await exchange.turn.begin()  # nobody will read a body that is not there
        await self._app(scope, exchange.receive, exchange.send)

    @contextmanager
    def _leashed(self, token: str, leash: asyncio.Timeout) -> Iterator[None]:
        mine = self._under_way.setdefault(token, set())
        mine.add(leash)
        try:
            yield
        finally:
            mine.discard(leash)
            if not mine:
                self._under_way.pop(token, None)

    def _end_later(self, token: str) -> None:
        """Called in the thread that revokes."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end, token)

    def _end(self, token: str) -> None:
        now = asyncio.get_running_loop().time()
        for leash in self._under_way.get(token, ()):
            leash.reschedule(now)


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
