"""A gateway server's backend over several: a version is there once every one of them has it, requests go to the idlest.

A backend that fails is asked last for a while, so that others answer in its place; it holds up new versions, since a
version that not all can serve is none to publish.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress

import structlog

from fedmoe.inference.backend import Backend, BackendError, ContinuationRequest, DecodingStep, ServedModel
from fedmoe.lora.adapter import Adapter

#: For how long a backend that failed is asked last.
_SHUNNED_SECONDS = 10.0
_log = structlog.get_logger("fedmoe.serve")


class BackendFleet:
    """A `Backend` over `backends`, which it closes."""

    def __init__(self, backends: Sequence[Backend], clock: Callable[[], float] = time.monotonic) -> None:
        self._backends = tuple(backends)
        self._clock = clock
        self._lock = threading.Lock()
        self._under_way = [0] * len(self._backends)
        self._failed = [float("-inf")] * len(self._backends)

    def load(self, model: ServedModel, adapter: Adapter) -> None:
        """Make a version available on every backend, or on none of them."""
        if model in self.loaded():
            raise BackendError(f"{model} is loaded already; a version is loaded once and never changes")
        for place, backend in enumerate(self._backends):
            try:
                # One may have it still, where unloading it failed.
                if model not in backend.loaded():
                    backend.load(model, adapter)
            except BackendError as error:
                for earlier in self._backends[:place]:
                    with suppress(BackendError):
                        earlier.unload(model)
                raise BackendError(f"replica {place + 1} of {len(self._backends)}: {error}") from error

    def unload(self, model: ServedModel) -> None:
        """Release a version on every backend; the first that fails is told of, once all were asked."""
        errors: list[BackendError] = []
        for backend in self._backends:
            try:
                backend.unload(model)
            except BackendError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def loaded(self) -> frozenset[ServedModel]:
        """What all of them have."""
        return frozenset.intersection(*(backend.loaded() for backend in self._backends))

    def log_likelihoods(self, pairs: Sequence[tuple[Sequence[int], ServedModel]]) -> list[float]:
        """By the idlest backend."""
        return self._backends[self._order()[0]].log_likelihoods(pairs)

    def busy(self) -> tuple[int, int]:
        """The sums over all of them."""
        running, waiting = zip(*(backend.busy() for backend in self._backends), strict=True)
        return sum(running), sum(waiting)

    async def generate(self, request: ContinuationRequest) -> AsyncGenerator[DecodingStep, None]:
        """The tokens as they come, by another backend where one fails before its first."""
        if request.model is not None and request.model not in self.loaded():
            raise BackendError(f"{request.model} is not loaded")
        order = self._order()
        for place in order:
            began = False
            self._count(place, 1)
            try:
                async with aclosing(self._backends[place].generate(request)) as steps:
                    async for step in steps:
                        began = True
                        yield step
                return
            except BackendError as error:
                self._failed[place] = self._clock()
                if began or place == order[-1]:
                    raise
                _log.warning("replica_failed", replica=place + 1, reason=str(error)[:300])
            finally:
                self._count(place, -1)

    def close(self) -> None:
        """Close them all."""
        for backend in self._backends:
            backend.close()

    def _count(self, place: int, change: int) -> None:
        with self._lock:
            self._under_way[place] += change

    def _order(self) -> list[int]:
        """The places of all backends: those that failed lately at the end, else by how much they have to do."""
        now = self._clock()
        with self._lock:
            shunned = [now - failed < _SHUNNED_SECONDS for failed in self._failed]
            return sorted(range(len(self._backends)), key=lambda place: (shunned[place], self._under_way[place]))
