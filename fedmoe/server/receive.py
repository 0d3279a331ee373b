"""Receiving a body: capped, with deadlines, hashed and written to disk while it arrives."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from dataclasses import dataclass

from starlette.requests import ClientDisconnect

from fedmoe.errors import RefusedError
from fedmoe.storage.blobs import BlobWriter

IDLE_SECONDS = 20.0
MIN_BYTES_PER_SECOND = 16 << 10
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True)
class Expected:
    """What a body must be: at most `cap` bytes, `length` bytes if declared, with this sha256."""

    cap: int
    length: int | None
    sha256: str


def parse_content_digest(value: str | None) -> str:
    """The sha256 of a `Content-Digest: sha-256=:BASE64:` header (RFC 9530), as hex."""
    for part in (value or "").split(","):
        name, _, encoded = part.strip().partition("=")
        if name.lower() == "sha-256" and len(encoded) > 2 and encoded[0] == encoded[-1] == ":":
            try:
                digest = base64.b64decode(encoded[1:-1], validate=True)
            except binascii.Error:
                continue
            if len(digest) == 32:
                return digest.hex()
    raise RefusedError(
        "digest_mismatch",
        f"a Content-Digest header with a sha-256 is needed, got {value!r}.",
        "Send 'Content-Digest: sha-256=:BASE64:' of the body.",
    )


def content_digest(sha256: bytes) -> str:
    """The `Content-Digest` header for a sha256."""
    return f"sha-256=:{base64.b64encode(sha256).decode()}:"


async def receive(chunks: AsyncIterator[bytes], expected: Expected, writer: BlobWriter, pool: Executor) -> None:
    """Write the body into `writer`, one piece behind the network, and check its size and hash.

    The whole body must arrive at `MIN_BYTES_PER_SECOND` or faster, and no pause may exceed `IDLE_SECONDS`: both
    deadlines follow from the size, so no time-out has to be tuned.
    """
    if expected.length is not None and expected.length > expected.cap:
        raise _too_large(expected.length, expected.cap)
    overall = IDLE_SECONDS + (expected.length or expected.cap) / MIN_BYTES_PER_SECOND
    try:
        async with asyncio.timeout(overall), asyncio.timeout(IDLE_SECONDS) as idle:
            await _copy(chunks, expected.cap, writer, pool, idle)
    except TimeoutError:
        raise RefusedError(
            "too_slow",
            f"the body stopped at {writer.size} bytes; at least {MIN_BYTES_PER_SECOND} bytes/s are needed.",
            "Push again over a better connection, or with a smaller --wire-dtype.",
        ) from None
    except ClientDisconnect:
        raise RefusedError("truncated", f"the connection closed after {writer.size} bytes of the body.") from None
    if expected.length is not None and writer.size != expected.length:
        raise RefusedError("truncated", f"Content-Length was {expected.length}, {writer.size} bytes arrived.")
    if writer.digest != expected.sha256:
        raise RefusedError(
            "digest_mismatch",
            f"the body's sha256 is {writer.digest}, Content-Digest promised {expected.sha256}.",
            "The body was damaged on its way; push again.",
        )


async def _copy(
    chunks: AsyncIterator[bytes], cap: int, writer: BlobWriter, pool: Executor, idle: asyncio.Timeout
) -> None:
    loop = asyncio.get_running_loop()
    total, piece = 0, bytearray()
    writing: asyncio.Future[None] | None = None
    try:
        async for chunk in chunks:
            idle.reschedule(loop.time() + IDLE_SECONDS)
            total += len(chunk)
            if total > cap:
                raise _too_large(total, cap)
            piece += chunk
            if len(piece) >= _PIECE:
                if writing is not None:
                    await writing
                writing, piece = loop.run_in_executor(pool, writer.write, bytes(piece)), bytearray()
    finally:
        if writing is not None:
            await writing  # the thread must be done with the file before anybody closes it
    if piece:
        await loop.run_in_executor(pool, writer.write, bytes(piece))


def _too_large(size: int, cap: int) -> RefusedError:
    return RefusedError(
        "too_large",
        f"the body has {size} bytes or more; an update of this expert has at most {cap}.",
        "Check that the worker's LoRA configuration is the federation's.",
    )
