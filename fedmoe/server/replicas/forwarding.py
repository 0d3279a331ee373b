"""Requests passed on to the owner, streamed both ways; answered 503 where there is no owner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import httpx2
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.types import Message, Receive, Scope, Send

from fedmoe.server.access.problems import no_owner
from fedmoe.server.replicas.ownership import Ownership, steady_seconds
from fedmoe.server.replicas.peers import NOT_OWNER, NOTHING_DONE, PeerSecret, RawHeaders, claims, end_to_end
from fedmoe.wire.transport import trusted_certificates

# Bodies up to this size are read first, so that they can be sent to another owner as well.
_BUFFERED_BYTES = 64 << 10
# An owner may work long on an answer; that it is gone shows when the lease ends.
_TIMEOUT = httpx2.Timeout(connect=2.0, read=300.0, write=60.0, pool=10.0)
_LIMITS = httpx2.Limits(max_connections=512, max_keepalive_connections=64, keepalive_expiry=30.0)
_PAUSE_SECONDS = 0.05
# What changes nothing however often it is asked, or is known by its identity.
_REPEATABLE = frozenset({"/get_expert_weights", "/push_expert_update", "/push_data_statistics"})


class OwnerAwayError(Exception):
    """The owner did not answer as one; `nothing_done` where it surely did nothing."""

    def __init__(self, reason: str, nothing_done: bool) -> None:
        super().__init__(reason)
        self.nothing_done = nothing_done


@dataclass(frozen=True, slots=True)
class PassedRequest:
    """A request for the owner; its body is in memory, streamed, or not there."""

    method: str
    target: bytes
    headers: RawHeaders
    body: bytes | AsyncIterator[bytes] | None

    @property
    def repeatable(self) -> bool:
        """Whether it may be sent again although nobody knows what became of it."""
        path = self.target.partition(b"?")[0].decode("latin-1")
        return not self.streams and (self.method in ("GET", "HEAD") or path in _REPEATABLE)

    @property
    def streams(self) -> bool:
        return not isinstance(self.body, bytes | None)


class OwnerDirectory(Protocol):
    """Who the owner is, for one event loop."""

    async def current(self) -> Ownership:
        """The owner, waited for; raises `RefusedError` where there is none in time."""
        ...

    async def replaced(self, owner: Ownership) -> None:
        """Returns once another term has begun."""
        ...

    def look(self) -> None:
        """Find out anew: the owner did not answer as one."""
        ...


class OwnerClient:
    """Sends requests to owners, over connections that are reused; for one event loop.

    A request that can be sent again is, to one owner after the other, for `patience` seconds.
    """

    def __init__(self, secret: PeerSecret, owners: OwnerDirectory, patience: float) -> None:
        self.secret = secret
        self._owners = owners
        self._patience = patience
        self._http: httpx2.AsyncClient | None = None

    async def ask(self, request: PassedRequest) -> httpx2.Response:
        """The answer of whoever is the owner, its body still to be read; whoever calls closes it.

        Raises `RefusedError` where there is no owner in time, or where nobody knows what became of the request.
        """
        deadline = steady_seconds() + self._patience
        while True:
            owner = await self._owners.current()
            try:
                return await self._ask_while_owner(owner, request)
            except OwnerAwayError as error:
                self._owners.look()
                again = request.repeatable or (error.nothing_done and not request.streams)
                if not again or steady_seconds() > deadline:
                    raise no_owner(f"the owner was lost: {error}") from error
                await asyncio.sleep(_PAUSE_SECONDS)

    async def _ask_while_owner(self, owner: Ownership, request: PassedRequest) -> httpx2.Response:
        """One that does not answer is waited for until another term begins: it may have been stopped, or cut off."""
        asking = asyncio.ensure_future(self._ask(owner.url, request))
        replaced = asyncio.ensure_future(self._owners.replaced(owner))
        try:
            await asyncio.wait([asking, replaced], return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise OwnerAwayError(f"the term of {owner.replica} is over", nothing_done=False)
            return asking.result()
        finally:
            replaced.cancel()
            if not asking.done():
                asking.cancel()

    async def _ask(self, url: str, passed: PassedRequest) -> httpx2.Response:
        target = httpx2.URL(url).copy_with(raw_path=passed.target)
        request = httpx2.Request(passed.method, target, headers=passed.headers, content=passed.body)
        try:
            answer = await self._client().send(request, stream=True)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            raise OwnerAwayError(f"{url} cannot be reached", nothing_done=True) from error
        except httpx2.TransportError as error:
            raise OwnerAwayError(f"{url} did not answer ({type(error).__name__})", nothing_done=False) from error
        if NOT_OWNER in answer.headers:
            await answer.aclose()
            raise OwnerAwayError(f"{url} is not the owner", nothing_done=answer.headers[NOT_OWNER] == NOTHING_DONE)
        return answer

    def _client(self) -> httpx2.AsyncClient:
        if self._http is None:
            # Straight to the owner: no proxy of the environment is between replicas.
            self._http = httpx2.AsyncClient(
                verify=trusted_certificates(), trust_env=False, timeout=_TIMEOUT, limits=_LIMITS
            )
        return self._http

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()


def target_of(scope: Scope) -> bytes:
    """Path and query of a request, as they came; bytes that no URL may have are escaped."""
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    target = path + b"?" + scope["query_string"] if scope["query_string"] else path
    return b"".join(bytes([byte]) if 0x20 < byte < 0x7F else b"%%%02X" % byte for byte in target)


async def forward(client: OwnerClient, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request with the owner's answer. A caller that leaves ends it at the owner too."""
    request = Request(scope, receive)
    headers = end_to_end(scope["headers"]) + claims(client.secret, scope)
    body = await _body_of(request)
    if body is None:
        headers = [(name, value) for name, value in headers if name != b"content-length"]
    passed = PassedRequest(scope["method"], target_of(scope), headers, body)
    if passed.streams:
        await relay(await client.ask(passed), send)
        return
    await _unless_left(_answer(client, passed, send), receive)


async def _answer(client: OwnerClient, passed: PassedRequest, send: Send) -> None:
    await relay(await client.ask(passed), send)


def is_short(headers: Headers) -> bool:
    """Whether a request says that its body is small enough to be read before it is passed on."""
    length = headers.get("content-length", "")
    return length.isdecimal() and int(length) <= _BUFFERED_BYTES


async def _body_of(request: Request) -> bytes | AsyncIterator[bytes] | None:
    if "transfer-encoding" not in request.headers and request.headers.get("content-length", "") in ("", "0"):
        return None
    return await request.body() if is_short(request.headers) else request.stream()


async def relay(answer: httpx2.Response, send: Send) -> None:
    """Pass an answer on, piece by piece; one that breaks off ends the caller's connection too."""
    try:
        headers = end_to_end(answer.headers.raw, without=(b"date",))
        await send({"type": "http.response.start", "status": answer.status_code, "headers": headers})
        async for piece in answer.aiter_raw():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    finally:
        await answer.aclose()


async def _unless_left(work: Awaitable[None], receive: Receive) -> None:
    """Do the work, whose request has come whole; stop it when the caller closes the connection."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working
            raise ClientDisconnect
        working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    message: Message = await receive()
    while message["type"] != "http.disconnect":
        message = await receive()
