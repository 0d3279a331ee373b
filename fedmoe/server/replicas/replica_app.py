"""The HTTP application of a replica: the owner answers from memory, the others pass requests on to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from fedmoe.lora.safetensors_bytes import CodecError
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access import problems
from fedmoe.server.access.problems import no_owner
from fedmoe.server.access.turns import UPLOADS
from fedmoe.server.replicas.forwarding import OwnerClient, forward, is_short
from fedmoe.server.replicas.ownership import Ownership, steady_seconds
from fedmoe.server.replicas.peers import (
    NOT_OWNER,
    NOTHING_DONE,
    SECRET,
    UNKNOWN,
    PeerSecret,
    caller_of,
    is_of_peer,
    without_claims,
)
from fedmoe.server.replicas.submission import LIMITS, Uploads
from fedmoe.server.replicas.tenure import OwnerCandidate, Tenure
from fedmoe.server.storage.blobs import BlobStore, StorageFailedError
from fedmoe.wire.http.body_limits import BodyGuard
from fedmoe.wire.http.middleware import readiness

#: What is answered without an end.
_STREAM = "/live"


class ReplicaApp:
    """Dispatches by who owns the federation now; for one event loop.

    `patience` is how many seconds a request waits for an owner.
    """

    def __init__(self, secret: PeerSecret, blobs: BlobStore, pool: Executor, patience: float) -> None:
        self._secret = secret
        self._patience = patience
        self._candidate: OwnerCandidate | None = None
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._under_way = 0
        self.client = OwnerClient(secret, self, patience)
        # Each open page holds a connection: those of a client of their own, so that pushes do not wait for them.
        self._for_streams = OwnerClient(secret, self, patience)
        self._uploads = Uploads(self.client, blobs, pool)
        self._follower = BodyGuard(self._follow, caps=dict.fromkeys(UPLOADS))
        self._failed = False
        #: Whether the process is to stop: what comes from then on is for the next owner.
        self.leaving = False

    def attach(self, candidate: OwnerCandidate) -> None:
        """Serve what this replica owns; called before the first request."""
        self._candidate = candidate

    def wake(self) -> None:
        """Have requests that wait for an owner look again; from any thread."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    async def leave(self, seconds: float) -> None:
        """End streams, and wait until the owner has answered what it took before, at most so long."""
        self.leaving = True
        self._wake()
        deadline = steady_seconds() + seconds
        while self._under_way and steady_seconds() < deadline:
            await asyncio.sleep(0.02)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self._loop = asyncio.get_running_loop()
        if scope["path"] == "/healthz":
            await JSONResponse({"status": "ok"})(scope, receive, send)
        elif scope["path"] == "/readyz":
            await readiness(self.not_ready)(scope, receive, send)
        elif scope["path"] == _STREAM:
            await self._in_this_term(scope, receive, send)
        else:
            await self._dispatch(scope, receive, send)

    async def close(self) -> None:
        """Close the connections to owners."""
        await self.client.close()
        await self._for_streams.close()

    async def _dispatch(self, scope: Scope, receive: Receive, send: Send) -> None:
        if is_of_peer(scope):
            await self._for_peer(scope, receive, send)
        else:
            await self._for_client({**scope, "headers": without_claims(scope)}, receive, send)

    async def _in_this_term(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a stream that ends with the term or when this replica leaves: its reader then comes again."""
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        streaming = asyncio.ensure_future(self._dispatch(scope, receive, noted))
        ending = asyncio.ensure_future(self._term_over(self._term))
        try:
            await asyncio.wait([streaming, ending], return_when=asyncio.FIRST_COMPLETED)
            if streaming.done():
                streaming.result()
                return
        finally:
            for task in (streaming, ending):
                task.cancel()
            await asyncio.gather(streaming, ending, return_exceptions=True)
        if begun:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            await problems.refusal(no_owner(self._no_owner))(scope, receive, send)

    @property
    def _term(self) -> int | None:
        """The newest term that this replica knows of."""
        seen = self._candidate.seen if self._candidate is not None else None
        return seen.term if seen is not None else None

    async def _term_over(self, term: int | None) -> None:
        """Returns once another term has begun than this one, or this replica leaves."""
        while not self.leaving and (term is None or self._term in (term, None)):
            term = self._term if term is None else term
            await self._change(60.0)

    @property
    def not_ready(self) -> str | None:
        """Why a balancer should send requests elsewhere; None where they are answered or passed on."""
        if self.leaving:
            return "the replica is stopping"
        if self._failed:
            return "this replica's own disk failed; its log says why"
        return None if self._tenure() is not None or self._owner() is not None else self._no_owner

    async def _for_peer(self, scope: Scope, receive: Receive, send: Send) -> None:
        secret = next(value for name, value in scope["headers"] if name.lower() == SECRET.encode())
        tenure = self._tenure()
        if not self._secret.admits(secret.decode("latin-1")):
            refused = RefusedError("forbidden", "the replicas' secret is another one.", "Give all replicas the same.")
            await problems.refusal(refused)(scope, receive, send)
        elif tenure is None:
            await _not_owner(NOTHING_DONE)(scope, receive, send)
        else:
            await self._answer(tenure, caller_of(scope), receive, send, lambda: _not_owner(UNKNOWN))

    async def _for_client(self, scope: Scope, receive: Receive, send: Send) -> None:
        tenure = self._tenure()
        if tenure is not None:
            lost = no_owner("the owner has changed while this was asked")
            await self._answer(tenure, scope, receive, send, lambda: problems.refusal(lost))
        else:
            await self._follower(scope, receive, send)

    async def _answer(
        self, tenure: Tenure, scope: Scope, receive: Receive, send: Send, otherwise: Callable[[], Response]
    ) -> None:
        """Answer from memory; `otherwise` if the term is over before the answer begins."""
        assert tenure.federation is not None, "only an open one is given"
        outcome = _TermBoundAnswer(tenure, send)
        counted = scope["path"] != _STREAM
        self._under_way += counted
        try:
            await tenure.federation.app(scope, receive, outcome.send)
        except Exception:
            if not outcome.withheld and tenure.valid:
                raise
        finally:
            self._under_way -= counted
        if outcome.withheld or not outcome.begun:
            self.look()
            await otherwise()(scope, receive, send)

    async def _follow(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            # A short body costs less in one request to the owner than a place in the store and two requests.
            if scope["method"] == "POST" and scope["path"] in LIMITS and not is_short(Headers(scope=scope)):
                await self._uploads.submit(scope, receive, noted)
            else:
                client = self._for_streams if scope["path"] == _STREAM else self.client
                await forward(client, scope, receive, noted)
        except ClientDisconnect:
            return
        except (RefusedError, CodecError, StorageFailedError) as error:
            self._failed = self._failed or isinstance(error, StorageFailedError)
            if begun:
                raise
            await _refusal(error)(scope, receive, send)

    async def current(self) -> Ownership:
        """The owner, waited for; this replica itself where it is."""
        deadline = steady_seconds() + self._patience
        while (owner := self._owner()) is None:
            if steady_seconds() >= deadline:
                raise no_owner(self._no_owner)
            await self._change(min(1.0, deadline - steady_seconds()))
        return owner

    async def replaced(self, owner: Ownership) -> None:
        while self._candidate is None or self._candidate.seen is None or self._candidate.seen.term == owner.term:
            await self._change(60.0)

    def look(self) -> None:
        if self._candidate is not None:
            self._candidate.look()

    @property
    def _no_owner(self) -> str:
        """Why nobody decides, as far as this replica knows."""
        unreachable = self._candidate.unreachable if self._candidate is not None else None
        return f"the database does not answer: {unreachable}" if unreachable else "no replica is the owner now"

    async def _change(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()

    def _tenure(self) -> Tenure | None:
        """This replica's term, while what is in memory may be shown."""
        tenure = self._candidate.tenure if self._candidate is not None else None
        usable = tenure is not None and tenure.federation is not None and tenure.valid and not self.leaving
        return tenure if usable else None

    def _owner(self) -> Ownership | None:
        """The owner as the newest row says, while its lease lasts and it can answer."""
        candidate = self._candidate
        if candidate is None or candidate.seen is None or steady_seconds() >= candidate.seen_until:
            return None
        opening = candidate.owns(candidate.seen) and self._tenure() is None
        return None if opening else candidate.seen

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class _TermBoundAnswer:
    """An answer on its way out, withheld if the term is over by then: what is in memory may be old."""

    def __init__(self, tenure: Tenure, send: Send) -> None:
        self._tenure = tenure
        self._send = send
        self.begun = self.withheld = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.withheld = not self._tenure.valid
            self.begun = not self.withheld
        if not self.withheld:
            await self._send(message)


def _not_owner(done: str) -> Response:
    answer = problems.refusal(no_owner("this replica is not the owner"))
    answer.headers[NOT_OWNER] = done
    return answer


def _refusal(error: RefusedError | CodecError | StorageFailedError) -> Response:
    if isinstance(error, RefusedError):
        return problems.refusal(error)
    return problems.not_decoded(error) if isinstance(error, CodecError) else problems.storage_failed(error)
