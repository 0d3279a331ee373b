"""Admission of uploads: a place for each body, and the minimum interval between a worker's pushes."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.quotas import ActiveUpload, UploadLimits, find_place, seconds_early
from fedmoe.wire.contract.messages import UpdateHeader

#: A worker that pushed longer ago than any interval is forgotten when there are more of them than this.
_REMEMBERED = 10_000


class UploadPlaces:
    """The places for uploads; one is taken when the first bytes of a body arrive, not by its head.

    `clock` gives seconds that nobody sets back.
    """

    def __init__(self, limits: UploadLimits, clock: Callable[[], float]) -> None:
        self._limits = limits
        self._clock = clock
        self._taken: dict[int, ActiveUpload] = {}
        self._leashes: dict[int, asyncio.Timeout] = {}
        self._next = 0

    def __len__(self) -> int:
        return len(self._taken)

    @asynccontextmanager
    async def one(self, token: str, worker: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The chunks of a body that takes a place with its first bytes and gives it back at the end.

        Raises `RefusedError`: from the chunks, if there is no place; from here, if this upload had to give way.
        """
        number, self._next = self._next, self._next + 1
        try:
            async with asyncio.timeout(None) as leash:
                yield self._placed(ActiveUpload(number, token, worker, 0.0, 0), chunks, leash)
        except TimeoutError:
            if not leash.expired():
                raise
            raise RefusedError(
                "gave_way",
                "the body paused, or its sender has many others, while others waited for a place.",
                "Nothing was stored; send it again.",
                retry_after=2,
            ) from None
        finally:
            self._taken.pop(number, None)
            self._leashes.pop(number, None)

    async def _placed(
        self, upload: ActiveUpload, chunks: AsyncIterator[bytes], leash: asyncio.Timeout
    ) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            now = self._clock()
            if chunk and upload.number not in self._taken:
                self._take(upload, leash, now)
            upload = replace(upload, heard_at=now, size=upload.size + len(chunk))
            if upload.number in self._taken:
                self._taken[upload.number] = upload
            yield chunk
        if upload.number in self._taken:
            # It has arrived: what it waits for now is the coordinator.
            self._taken[upload.number] = replace(upload, heard_at=math.inf)

    def _take(self, upload: ActiveUpload, leash: asyncio.Timeout, now: float) -> None:
        place = find_place(upload.token, upload.worker, list(self._taken.values()), self._limits, now)
        if place.full:
            raise _no_place(place.full, self._limits)
        if place.instead_of is not None:
            self._taken.pop(place.instead_of)
            self._leashes.pop(place.instead_of).reschedule(asyncio.get_running_loop().time())
        self._taken[upload.number] = upload
        self._leashes[upload.number] = leash


@dataclass(frozen=True, slots=True)
class _Push:
    identity: tuple[str, int]
    at: float


class PushPace:
    """Makes workers keep the least interval between two pushes to an expert; None or 0 asks for none.

    What is sent again is not early, however soon it comes: neither the newest push nor one that `knows` knows.
    """

    def __init__(
        self, interval: float | None, clock: Callable[[], float], knows: Callable[[UpdateHeader], bool]
    ) -> None:
        self._interval = interval or 0.0
        self._clock = clock
        self._knows = knows
        self._pushes: dict[tuple[str, str], _Push] = {}

    @asynccontextmanager
    async def kept(self, header: UpdateHeader) -> AsyncIterator[None]:
        """Raises `RefusedError` for a push that is early; one that does not succeed does not count."""
        key, push = (header.expert, header.worker), _Push((header.epoch, header.sequence), self._clock())
        before = self._pushes.get(key)
        if not self._interval or (before is not None and before.identity == push.identity):
            yield
            return
        early = seconds_early(before.at if before else None, push.at, self._interval)
        if early:
            if not await asyncio.to_thread(self._knows, header):
                raise RefusedError(
                    "too_soon",
                    f"worker {header.worker!r} pushed to {header.expert!r} less than {self._interval:g} s ago.",
                    f"Push again in {early:.1f} s; the least interval is min_sync_interval of GET /federation.",
                    retry_after=math.ceil(early),
                    seconds_left=round(early, 3),
                )
            yield
            return
        self._remember(key, push)
        try:
            yield
        except BaseException:
            if self._pushes.get(key) == push:
                self._pushes.pop(key)
                if before is not None:
                    self._pushes[key] = before
            raise

    def _remember(self, key: tuple[str, str], push: _Push) -> None:
        if len(self._pushes) >= _REMEMBERED:
            due = push.at - self._interval
            self._pushes = {name: one for name, one in self._pushes.items() if one.at > due}
        self._pushes[key] = push


class UploadAdmission:
    """What every upload passes: the pace of its worker, and a place for its body."""

    def __init__(
        self,
        interval: float | None,
        knows: Callable[[UpdateHeader], bool],
        limits: UploadLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.places = UploadPlaces(limits or UploadLimits(), clock)
        self._pace = PushPace(interval, clock, knows)

    @asynccontextmanager
    async def push(
        self, token: str, header: UpdateHeader, chunks: AsyncIterator[bytes]
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The chunks of an update, if it may come now."""
        async with self._pace.kept(header), self.places.one(token, header.worker, chunks) as placed:
            yield placed


def _no_place(full: str, limits: UploadLimits) -> RefusedError:
    if full == "the coordinator":
        return RefusedError(
            "busy", f"{limits.total} updates are being received.", "Retry after the time given.", retry_after=2
        )
    most = limits.of_token if full == "this token" else limits.of_worker
    return RefusedError(
        "quota_exceeded",
        f"{full} has {most} uploads under way, which is all it may have.",
        "Retry after the time given; finish or close the others.",
        retry_after=2,
    )
