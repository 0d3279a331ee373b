"""Long uploads at a replica that is not the owner: the body goes into the blob store, the owner gets its digest."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from dataclasses import replace

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from fedmoe.server.access.uploads import UploadPlaces
from fedmoe.server.replicas.forwarding import OwnerClient, PassedRequest, relay, target_of
from fedmoe.server.replicas.peers import claims, end_to_end
from fedmoe.server.storage.blobs import BlobStore
from fedmoe.server.updates.upload import Body, in_thread, opened_writer, receive, tensor_body
from fedmoe.wire.contract.replicas import UploadLimit

#: Where uploads are sent, and where the owner says how large one may be.
LIMITS = {"/push_expert_update": b"/update_limit", "/push_data_statistics": b"/data_statistics_limit"}
_OF_THE_BODY = (b"content-length",)
# The question has no body, and is answered in JSON.
_NOT_ASKED = (*_OF_THE_BODY, b"content-type", b"content-digest", b"content-encoding", b"accept")


class Uploads:
    """Receives uploads for the owner; `pool` runs what blocks."""

    def __init__(self, client: OwnerClient, blobs: BlobStore, pool: Executor) -> None:
        self._client = client
        self._blobs = blobs
        self._pool = pool
        self._places = UploadPlaces()

    async def submit(self, scope: Scope, receive_message: Receive, send: Send) -> None:
        """Receive a body, store it, and answer as the owner does; nothing is stored that the owner would not take."""
        request = Request(scope, receive_message)
        limit = await self._limit(request, send)
        if limit is None:
            return
        body = tensor_body(request)
        worker = request.query_params.get("worker", "")
        async with self._places.place(limit.token, worker, body.chunks) as chunks:
            size = await self._store(body, chunks, limit.bytes)
        headers = end_to_end(scope["headers"], without=_OF_THE_BODY) + claims(self._client.secret, scope, size)
        await relay(await self._client.ask(PassedRequest("POST", target_of(scope), headers, None)), send)

    async def _limit(self, request: Request, send: Send) -> UploadLimit | None:
        """What the owner would take; None if it refuses, which is answered then."""
        scope = request.scope
        headers = end_to_end(scope["headers"], without=_NOT_ASKED) + claims(self._client.secret, scope)
        target = LIMITS[scope["path"]] + b"?" + scope["query_string"]
        answer = await self._client.ask(PassedRequest("GET", target, headers, None))
        if answer.status_code != 200:
            await relay(answer, send)
            return None
        try:
            return UploadLimit.model_validate(json.loads(await answer.aread()))
        finally:
            await answer.aclose()

    async def _store(self, body: Body, chunks: AsyncIterator[bytes], most: int) -> int:
        """Put a body into the blob store under its digest; its size."""
        writer = await opened_writer(self._blobs, self._pool)
        try:
            await receive(replace(body, chunks=chunks), most, writer, self._pool)
            await in_thread(self._pool, writer.commit)
            return writer.size
        finally:
            await in_thread(self._pool, writer.abort)
