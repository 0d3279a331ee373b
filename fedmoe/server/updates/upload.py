"""Upload of a body: written to disk with cap and hash, the norm of its numbers checked."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from starlette.requests import ClientDisconnect, Request

from fedmoe.lora.adapter import FloatVector, Layout
from fedmoe.lora.update_rules import first_not_finite
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.security import STORED_BYTES
from fedmoe.server.storage.blobs import BlobStore, BlobWriter, CorruptBlobError, MissingBlobError
from fedmoe.wire.contract.messages import SAFETENSORS

Result = TypeVar("Result")

#: The largest norm of an update. Far above any real one, and so small that no number of updates overflows an expert.
MAX_NORM = 1e9
# What a request gathers before it is written.
_WRITTEN_BYTES = 128 << 10
# Numbers that are squared in double precision at once.
_SQUARED = 1 << 16


@dataclass(frozen=True, slots=True)
class Body:
    """A body on its way in: the chunks, the declared length if any, and the promised sha256 (hex).

    A `stored` one lies in the blob store already, under that sha256, and has no chunks.
    """

    chunks: AsyncIterator[bytes]
    length: int | None
    sha256: str
    stored: bool = False


def tensor_body(request: Request) -> Body:
    """The body of a request that sends numbers; refuses other forms, and one without a digest."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != SAFETENSORS:
        raise RefusedError(
            "unsupported_type",
            f"numbers are sent as {SAFETENSORS}, got {content_type or 'no Content-Type'}.",
            "Pickle, .pt and .bin files are never read; convert to safetensors.",
        )
    encoding = ", ".join(request.headers.getlist("content-encoding")) or "identity"
    if encoding.lower() != "identity":
        raise RefusedError(
            "unsupported_type", f"Content-Encoding {encoding!r} is not taken.", "Send the bytes as they are."
        )
    length = request.headers.get("content-length", "")
    digest = parse_content_digest(request.headers.getlist("content-digest"))
    stored = request.scope.get("state", {}).get(STORED_BYTES)
    if stored is not None:
        return Body(request.stream(), stored, digest, stored=True)
    return Body(request.stream(), int(length) if length.isdecimal() else None, digest)


def parse_content_digest(values: Sequence[str]) -> str:
    """The one sha256 in all `Content-Digest: sha-256=:BASE64:` headers of a request (RFC 9530), as hex."""
    parts = [part.strip().partition("=") for value in values for part in value.split(",")]
    hashes = [encoded.strip() for name, _, encoded in parts if name.strip().lower() == "sha-256"]
    digest = _decoded(hashes[0]) if len(hashes) == 1 else None
    if digest is not None:
        return digest.hex()
    raise RefusedError(
        "digest_mismatch",
        f"a Content-Digest header with one sha-256 is needed, got {', '.join(values)[:200] or None!r}.",
        "Send 'Content-Digest: sha-256=:BASE64:' of the body.",
    )


def _decoded(encoded: str) -> bytes | None:
    try:
        digest = base64.b64decode(encoded[1:-1], validate=True)
    except binascii.Error:
        return None
    return digest if len(digest) == 32 and encoded[0] == encoded[-1] == ":" else None


def content_digest(sha256: bytes) -> str:
    """The `Content-Digest` header for a sha256."""
    return f"sha-256=:{base64.b64encode(sha256).decode()}:"


async def opened_writer(blobs: BlobStore, pool: Executor) -> BlobWriter:
    """A file to write a body into; made in a thread, since it waits where others force theirs onto the disk."""
    making = asyncio.get_running_loop().run_in_executor(pool, blobs.writer)
    try:
        return await settled(making)
    except asyncio.CancelledError:
        if not making.cancelled() and making.exception() is None:
            making.result().abort()
        raise


class StoredBody:
    """A body that another coordinator has put into the blob store, as if it had just been written here.

    It is not deleted before `abort`: not even by who finds that nothing else needs these bytes.
    """

    def __init__(self, blobs: BlobStore, body: Body) -> None:
        self._blobs = blobs
        self.size = body.length or 0
        self.digest = body.sha256
        self._data: bytes | None = None
        self._pinned = True
        blobs.pins.add(self.digest)

    def write(self, data: bytes | memoryview) -> None:
        raise AssertionError("what is stored is not written to")

    def view(self) -> memoryview:
        """The bytes; raises `RefusedError` where they are gone, so that they are sent again."""
        if self._data is None:
            try:
                self._data = self._blobs.read(self.digest)
            except (MissingBlobError, CorruptBlobError) as error:
                raise RefusedError(
                    "busy", f"the body was not kept: {error}.", "Send it again.", retry_after=1
                ) from None
        return memoryview(self._data)

    def commit(self) -> str:
        return self.digest

    def abort(self) -> None:
        self._data = None
        if self._pinned:
            self._pinned = False
            self._blobs.pins.remove(self.digest)


async def receive(body: Body, cap: int, writer: BlobWriter, pool: Executor) -> None:
    """Write a body of at most `cap` bytes into `writer` piece by piece, and check its size and hash.

    Nothing more is taken while a piece is written: what arrives meanwhile waits in the connection's own buffer.
    """
    check_size(body.length, cap)
    total, gathered = 0, 0
    piece: list[bytes] = []
    try:
        async for chunk in body.chunks:
            total += len(chunk)
            check_size(total, cap)
            piece.append(chunk)
            gathered += len(chunk)
            if gathered >= _WRITTEN_BYTES:
                await in_thread(pool, partial(_write, writer, piece))
                piece, gathered = [], 0
    except ClientDisconnect:
        raise RefusedError("truncated", f"the connection closed after {total} bytes of the body.") from None
    if piece:
        await in_thread(pool, partial(_write, writer, piece))
    if body.length is not None and writer.size != body.length:
        raise RefusedError("truncated", f"Content-Length was {body.length}, {writer.size} bytes arrived.")
    if writer.digest != body.sha256:
        raise RefusedError(
            "digest_mismatch",
            f"the body's sha256 is {writer.digest}, Content-Digest promised {body.sha256}.",
            "The body was damaged on its way; push again.",
        )


def _write(writer: BlobWriter, piece: list[bytes]) -> None:
    for chunk in piece:
        writer.write(chunk)


async def in_thread(pool: Executor, call: Callable[[], Result]) -> Result:
    """The result of a call in a thread of the pool; see `settled`."""
    return await settled(asyncio.get_running_loop().run_in_executor(pool, call))


async def settled(work: asyncio.Future[Result]) -> Result:
    """What a thread made, waited for even if the request is cancelled meanwhile: the thread still uses its files."""
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        if not work.cancelled():
            work.exception()  # seen: nobody else will ask for it
        raise cancelled
    return work.result()


def check_size(size: int | None, cap: int) -> None:
    """Refuse a body that is larger than the expert's updates can be; None is not known yet."""
    if size is not None and size > cap:
        raise RefusedError(
            "too_large",
            f"the body has {size} bytes or more; at most {cap} are read here for this expert.",
            "Check that the worker's LoRA configuration is the federation's.",
        )


def usable_norm(layout: Layout, flat: FloatVector) -> float:
    """The L2 norm; refuses numbers that would break an expert: not finite, or a sum that could overflow float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(np.dot(flat, flat))
    if squared <= MAX_NORM**2:  # one pass decides the usual case; false for a NaN
        return math.sqrt(squared)
    bad = first_not_finite(layout, flat)
    if bad is not None:
        raise RefusedError(
            "not_finite", f"{bad} holds a NaN or an infinity.", "Lower the learning rate; never push such weights."
        )
    norm = math.sqrt(
        sum(float(np.square(flat[at : at + _SQUARED], dtype=np.float64).sum()) for at in range(0, len(flat), _SQUARED))
    )
    raise RefusedError(
        "norm_too_large",
        f"the update's norm is {norm:.3g}; at most {MAX_NORM:g} is taken, real ones are near 1.",
        "Lower the learning rate or clip the gradients; never push such weights.",
        norm=norm,
    )
