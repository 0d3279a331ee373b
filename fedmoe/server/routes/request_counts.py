"""Counts for `/metrics`: requests by route and status, pushes by what became of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmoe.lora.safetensors_bytes import CodecError
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.wire.contract.messages import UpdateResult
from fedmoe.wire.http.metrics import histogram

_METHODS = frozenset({"GET", "POST"})
_OTHER = "other"
# A status of our own: the connection was closed before there was an answer.
_GONE = 499
_VERSIONS = (0, 1, 2, 4, 8, 16, 32, 64, 128)


class RequestCounts:
    """Requests since the start, by method, route and status; for one event loop."""

    def __init__(self, routes: Iterable[str]) -> None:
        self._routes = frozenset(routes)
        self.by_answer: Counter[tuple[str, str, str]] = Counter()

    def note(self, method: str, path: str, status: int) -> None:
        """Count a request; paths and methods that no route has are one, since callers may invent any number of them."""
        route = path if path in self._routes else _OTHER
        self.by_answer[method if method in _METHODS else _OTHER, route, str(status)] += 1


class CountingMiddleware:
    """Counts every request with the status of its answer."""

    def __init__(self, app: ASGIApp, counts: RequestCounts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = _GONE

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            self._counts.note(scope["method"], scope["path"], status)


@dataclass
class PushOutcome:
    """What became of a push: its `result` if it was taken in, else the `code` of its refusal."""

    result: UpdateResult | None = None
    code: str = ""


@dataclass
class PushCounts:
    """Pushes since the start, as the workers were answered; experts by their first names, empty for one not there."""

    by_result: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    staleness: Histogram = field(
        default_factory=lambda: histogram(
            "fedmoe_coordinator_update_staleness", "Versions an update was behind its expert when it landed.", _VERSIONS
        )
    )
    seconds: Histogram = field(
        default_factory=lambda: histogram(
            "fedmoe_coordinator_push_duration_seconds",
            "From the head of a push to its answer, the upload included; of pushes that landed, are held or repeated.",
        )
    )

    @contextmanager
    def outcome(self, expert: str, experts: Container[str]) -> Iterator[PushOutcome]:
        """Count a push to this one of the experts when the context ends, by the outcome or by what is raised."""
        outcome, began = PushOutcome(), time.perf_counter()
        try:
            yield outcome
        except BaseException as error:
            outcome.code = _code(error)
            raise
        finally:
            self._note(expert if expert in experts else "", outcome, time.perf_counter() - began)

    def _note(self, expert: str, outcome: PushOutcome, seconds: float) -> None:
        result = outcome.result
        if result is None:
            self.by_result[expert, "refused"] += 1
            self.refused[outcome.code] += 1
            return
        held = result.status == "quarantined"
        self.by_result[expert, "repeated" if result.duplicate else "held" if held else "landed"] += 1
        self.seconds.observe(seconds)
        if not (held or result.duplicate):
            self.staleness.observe(result.staleness)


def _code(error: BaseException) -> str:
    """The code of a refusal; there are as many as the coordinator's source has."""
    if isinstance(error, RefusedError | CodecError):
        return error.code
    if isinstance(error, asyncio.CancelledError):
        return "cut_off"
    return "storage_failed" if isinstance(error, StorageFailedError) else "internal_error"
