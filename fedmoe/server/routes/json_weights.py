"""Weights as JSON: streamed in pieces, few answers at once, each with a deadline.

A number takes about 20 characters here and 4 bytes in safetensors, and whoever writes it holds the interpreter. So an
answer is written in pieces of a millisecond, between which the event loop takes its turn.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import structlog
from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from fedmoe.lora.adapter import FloatMatrix
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access import problems
from fedmoe.wire.contract.messages import SAFETENSORS

_log = structlog.get_logger("fedmoe.http")

#: Numbers in one answer; B1, B2 and B5 of the specification hold for a base model of half a billion parameters.
DEFAULT_JSON_LIMIT = 8_000_000
#: Answers written at once.
_AT_ONCE = 2
#: How long the receiver of one answer may keep us waiting, all its pauses together.
RECEIVER_SECONDS = 60.0
# About a millisecond of writing.
_PIECE_NUMBERS = 1 << 14
# Smaller pieces are sent together: each costs half a millisecond on its way.
_LEAST_BYTES = 1 << 16

Modules = Iterable[tuple[str, FloatMatrix, FloatMatrix]]


@dataclass(frozen=True)
class JsonPolicy:
    """How many numbers an answer may have, how many are written at once, and how long a receiver may take."""

    limit: int = DEFAULT_JSON_LIMIT
    receiver_seconds: float = RECEIVER_SECONDS
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE))

    def check(self, numbers: int) -> None:
        """Refuse weights that are too many to be written as text."""
        if numbers > self.limit:
            raise RefusedError(
                "not_acceptable",
                f"these weights are {numbers} numbers; at most {self.limit} are written as JSON.",
                f"Send 'Accept: {SAFETENSORS}', a fifth of the bytes; or start the coordinator with a larger "
                "--json-limit.",
                numbers=numbers,
                json_limit=self.limit,
            )


class JsonWeights(StreamingResponse):
    """One answer in JSON. Without a free slot it is refused with 429, or waits if what it tells has happened already.

    A receiver that leaves gives its slot back at once, one that reads too slowly after `receiver_seconds`.
    """

    def __init__(
        self,
        head: Mapping[str, object],
        modules: Modules,
        policy: JsonPolicy,
        status: int,
        headers: Mapping[str, str],
        waits: bool,
    ) -> None:
        super().__init__(json_pieces(head, modules), status, headers, "application/json")
        self._policy = policy
        self._waits = waits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        slots = self._policy.slots
        if slots.locked() and not self._waits:
            error = RefusedError(
                "json_busy",
                f"{_AT_ONCE} answers are being written as JSON.",
                f"Retry after the time given, or send 'Accept: {SAFETENSORS}', which has no such limit.",
            )
            await problems.refusal(error)(scope, receive, send)
            return
        async with slots:
            await super().__call__(scope, receive, send)

    async def stream_response(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        loop, seconds = asyncio.get_running_loop(), self._policy.receiver_seconds
        async for piece in self.body_iterator:
            started = loop.time()
            try:
                async with asyncio.timeout(seconds):
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
            except TimeoutError:
                _log.warning("receiver_too_slow", seconds=self._policy.receiver_seconds, fix=f"Accept: {SAFETENSORS}")
                return  # an answer that is not complete ends its connection
            seconds -= loop.time() - started
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def json_pieces(head: Mapping[str, object], modules: Modules) -> Iterator[bytes]:
    """One JSON object in pieces: `head` (never empty), then `modules` with both factors of each as lists of rows.

    Every number is the float32 in double precision, in as few digits as name that double, so none is changed.
    """
    waiting, size = list[bytes](), 0
    for piece in _pieces(head, modules):
        waiting.append(piece)
        size += len(piece)
        if size >= _LEAST_BYTES:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)


def _pieces(head: Mapping[str, object], modules: Modules) -> Iterator[bytes]:
    yield json.dumps(head)[:-1].encode() + b', "modules": {'
    separator = b""
    for name, a, b in modules:
        yield separator + json.dumps(name).encode() + b': {"lora_A": '
        yield from _matrix(a)
        yield b', "lora_B": '
        yield from _matrix(b)
        yield b"}"
        separator = b", "
    yield b"}}\n"


def _matrix(values: FloatMatrix) -> Iterator[bytes]:
    rows, columns = values.shape
    if columns > _PIECE_NUMBERS:
        for row in range(rows):
            yield b"[[" if row == 0 else b"],["
            yield from _in_slices(values[row], _PIECE_NUMBERS)
        yield b"]]"
        return
    yield b"["
    yield from _in_slices(values, _PIECE_NUMBERS // columns)
    yield b"]"


def _in_slices(values: FloatMatrix, step: int) -> Iterator[bytes]:
    """The items of an array without its brackets, `step` of them at a time."""
    for start in range(0, len(values), step):
        text = to_json(values[start : start + step].tolist())[1:-1]
        yield b"," + text if start else text
