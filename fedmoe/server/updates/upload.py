"""Receiving an update: body written to disk with cap and hash, norm checked, outcome logged."""

from __future__ import annotations

import asyncio
import base64
import binascii
import math
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import structlog
from starlette.requests import ClientDisconnect

from fedmoe.coordinator import Submission
from fedmoe.federation.events import HeldUpdateRejected, UpdateAccepted, UpdateHeld
from fedmoe.lora.adapter import FloatVector, Layout
from fedmoe.lora.update_rules import first_not_finite
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blobs import BlobStore, BlobWriter
from fedmoe.wire.contract.messages import UpdateHeader, UpdateResult

Result = TypeVar("Result")

#: What a request gathers before it is written.
_PIECE = 128 << 10


@dataclass(frozen=True, slots=True)
class ExpectedBody:
    """What a body must be: at most `cap` bytes, `length` bytes if declared, with this sha256."""

    cap: int
    length: int | None
    sha256: str


def parse_content_digest(values: Sequence[str]) -> str:
    """The one sha256 in all `Content-Digest: sha-256=:BASE64:` headers of a request (RFC 9530), as hex."""
    parts = [part.strip().partition("=") for value in values for part in value.split(",")]
    found = [encoded.strip() for name, _, encoded in parts if name.strip().lower() == "sha-256"]
    digest = _decoded(found[0]) if len(found) == 1 else None
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


async def receive(chunks: AsyncIterator[bytes], expected: ExpectedBody, writer: BlobWriter, pool: Executor) -> None:
    """Write the body into `writer` piece by piece, and check its size and hash."""
    if expected.length is not None and expected.length > expected.cap:
        raise _too_large(expected.length, expected.cap)
    await _copy(chunks, expected.cap, writer, pool)
    if expected.length is not None and writer.size != expected.length:
        raise RefusedError("truncated", f"Content-Length was {expected.length}, {writer.size} bytes arrived.")
    if writer.digest != expected.sha256:
        raise RefusedError(
            "digest_mismatch",
            f"the body's sha256 is {writer.digest}, Content-Digest promised {expected.sha256}.",
            "The body was damaged on its way; push again.",
        )


async def _copy(chunks: AsyncIterator[bytes], cap: int, writer: BlobWriter, pool: Executor) -> None:
    """Nothing more is taken while a piece is written: what arrives meanwhile waits in the connection's own buffer."""
    total, gathered = 0, 0
    piece: list[bytes] = []
    try:
        async for chunk in chunks:
            total += len(chunk)
            if total > cap:
                raise _too_large(total, cap)
            piece.append(chunk)
            gathered += len(chunk)
            if gathered >= _PIECE:
                await settled(_start(pool, writer, piece))
                piece, gathered = [], 0
    except ClientDisconnect:
        raise RefusedError("truncated", f"the connection closed after {total} bytes of the body.") from None
    if piece:
        await settled(_start(pool, writer, piece))


def _start(pool: Executor, writer: BlobWriter, piece: list[bytes]) -> asyncio.Future[None]:
    def write() -> None:
        for chunk in piece:
            writer.write(chunk)

    return asyncio.get_running_loop().run_in_executor(pool, write)


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


def _too_large(size: int, cap: int) -> RefusedError:
    return RefusedError(
        "too_large",
        f"the body has {size} bytes or more; at most {cap} are read here for this expert.",
        "Check that the worker's LoRA configuration is the federation's.",
    )


_log = structlog.get_logger("fedmoe.coordinator")

#: The largest norm of an update. Far above any real one, and so small that no number of updates overflows an expert.
MAX_NORM = 1e9
_PIECE = 1 << 16


def refuse_other_bytes(earlier: UpdateAccepted | UpdateHeld | HeldUpdateRejected, submission: Submission) -> None:
    """The same update again is fine; another one under its number is not."""
    if (earlier.digest, earlier.expert) != (submission.digest, submission.expert):
        raise RefusedError(
            "sequence_reused",
            f"worker {submission.worker!r} already sent another update as number {submission.sequence}.",
            "Every update needs its own number; a restored worker state needs a new epoch.",
            accepted_digest=earlier.digest,
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
        sum(float(np.square(flat[at : at + _PIECE], dtype=np.float64).sum()) for at in range(0, len(flat), _PIECE))
    )
    raise RefusedError(
        "norm_too_large",
        f"the update's norm is {norm:.3g}; at most {MAX_NORM:g} is taken, real ones are near 1.",
        "Lower the learning rate or clip the gradients; never push such weights.",
        norm=norm,
    )


def submission_of(header: UpdateHeader, digest: str, norm: float | None = None) -> Submission:
    info = {"loss": header.loss, "steps": header.steps, "tokens": header.tokens}
    return Submission(
        header.expert,
        header.worker,
        header.epoch,
        header.sequence,
        header.base_version,
        digest,
        {key: float(value) for key, value in info.items() if value is not None},
        norm,
    )


def log_update(header: UpdateHeader, result: UpdateResult) -> None:
    """Say what became of an update."""
    named = {"expert": result.expert, "worker": header.worker, "sequence": header.sequence}
    if result.status != "landed":
        _log.warning(result.status, **named, held=result.held, reason=result.note, duplicate=result.duplicate)
        return
    _log.info(
        "update",
        **named,
        version=result.version,
        staleness=result.staleness,
        coefficient=round(result.coefficient, 6),
        digest=result.digest[:12],
        duplicate=result.duplicate,
    )
