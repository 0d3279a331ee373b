"""Admission of uploads: a place for each body, and the minimum interval between a worker's pushes."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import NoReturn

from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.contract.messages import UpdateHeader

#: A worker that pushed longer ago than any interval is forgotten when there are more of them than this.
_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Uploads under way: in all, of one token, of one worker with it; after how many silent seconds one gives way."""

    total: int = 96
    of_token: int = 64
    of_worker: int = 16
    silent_seconds: float = 2.0


@dataclass(frozen=True, slots=True)
class ActiveUpload:
    """An upload that has a place: whose it is, when bytes last came, and how many have come.

    An empty `token` is that of everybody, where none is asked for. `heard_at` is infinite once all has arrived: then it
    waits for the coordinator, and gives way to nobody.
    """

    number: int
    token: str
    worker: str
    heard_at: float
    size: int


def find_place(
    token: str, worker: str, taken: Sequence[ActiveUpload], limits: UploadLimits, now: float
) -> ActiveUpload | None:
    """The upload that gives its place to one whose first bytes came, None for a free place; refuses where none does.

    Where a limit is reached, the upload of those under it that was silent longest gives way. Where all places are
    taken by others, the smallest upload of the token that has most of them gives way to one that has less than half.
    """
    of_worker = [upload for upload in taken if (upload.token, upload.worker) == (token, worker)]
    if len(of_worker) >= limits.of_worker:
        return _silent(of_worker, limits, now) or _refuse(f"worker {worker!r}", limits.of_worker)
    of_token = [upload for upload in taken if upload.token == token]
    if token and len(of_token) >= limits.of_token:
        return _silent(of_token, limits, now) or _refuse("this token", limits.of_token)
    if len(taken) < limits.total:
        return None
    upload = _silent(taken, limits, now) or _of_the_greediest(token, taken)
    if upload is None:
        received = f"{limits.total} updates are being received."
        raise RefusedError("busy", received, "Retry after the time given.", retry_after=2)
    return upload


def _refuse(whose: str, most: int) -> NoReturn:
    raise RefusedError(
        "quota_exceeded",
        f"{whose} has {most} uploads under way, which is all it may have.",
        "Retry after the time given; finish or close the others.",
        retry_after=2,
    )


def _silent(taken: Sequence[ActiveUpload], limits: UploadLimits, now: float) -> ActiveUpload | None:
    longest = min(taken, key=lambda upload: (upload.heard_at, upload.number))
    return longest if now - longest.heard_at >= limits.silent_seconds else None


def _of_the_greediest(token: str, taken: Sequence[ActiveUpload]) -> ActiveUpload | None:
    counts = Counter(upload.token for upload in taken)
    greediest = max(counts, key=lambda name: (counts[name], name))
    if 2 * (counts[token] + 1) > counts[greediest]:
        return None
    arriving = [upload for upload in taken if upload.token == greediest and upload.heard_at < math.inf]
    return min(arriving, key=lambda upload: (upload.size, upload.number), default=None)


def seconds_early(last: float | None, now: float, interval: float) -> float:
    """How much too early a push comes after one at `last`; a tenth of the interval is left to the network's jitter."""
    if last is None or now - last >= 0.9 * interval:
        return 0.0
    return interval - (now - last)


class UploadPlaces:
    """The places for uploads; one is taken when the first bytes of a body arrive, not by its head."""

    def __init__(self, limits: UploadLimits | None = None) -> None:
        self._limits = limits or UploadLimits()
        self._taken: dict[int, ActiveUpload] = {}
        self._timeouts: dict[int, asyncio.Timeout] = {}
        self._next = 0

    @asynccontextmanager
    async def place(self, token: str, worker: str, chunks: AsyncIterator[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
        """The chunks of a body that takes a place with its first bytes and gives it back at the end.

        Raises `RefusedError`: from the chunks, if there is no place; from here, if this upload had to give way.
        """
        number, self._next = self._next, self._next + 1
        try:
            async with asyncio.timeout(None) as timeout:
                yield self._placed(ActiveUpload(number, token, worker, 0.0, 0), chunks, timeout)
        except TimeoutError:
            if not timeout.expired():
                raise
            raise RefusedError(
                "gave_way",
                "the body paused, or its sender has many others, while others waited for a place.",
                "Nothing was stored; send it again.",
                retry_after=2,
            ) from None
        finally:
            self._taken.pop(number, None)
            self._timeouts.pop(number, None)

    async def _placed(
        self, upload: ActiveUpload, chunks: AsyncIterator[bytes], timeout: asyncio.Timeout
    ) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            now = time.monotonic()
            if chunk and upload.number not in self._taken:
                sitting = list(self._taken.values())
                loser = find_place(upload.token, upload.worker, sitting, self._limits, now)
                if loser is not None:
                    self._taken.pop(loser.number)
                    self._timeouts.pop(loser.number).reschedule(asyncio.get_running_loop().time())
                self._timeouts[upload.number] = timeout
                self._taken[upload.number] = upload
            upload = replace(upload, heard_at=now, size=upload.size + len(chunk))
            if upload.number in self._taken:
                self._taken[upload.number] = upload
            yield chunk
        if upload.number in self._taken:
            # It has arrived: what it waits for now is the coordinator.
            self._taken[upload.number] = replace(upload, heard_at=math.inf)


class PushPace:
    """Makes workers keep the least interval between two pushes to an expert; None or 0 asks for none.

    What is sent again is not early, however soon it comes: neither the newest push nor one that `knows` knows.
    """

    def __init__(self, interval: float | None, knows: Callable[[UpdateHeader], bool]) -> None:
        self._interval = interval or 0.0
        self._knows = knows
        # By expert and worker: the epoch and number of the newest push, and when it came.
        self._pushes: dict[tuple[str, str], tuple[tuple[str, int], float]] = {}

    async def check(self, header: UpdateHeader) -> bool:
        """Whether a push counts for the interval; raises `RefusedError` for one that is early."""
        before = self._pushes.get((header.expert, header.worker))
        repeated = before is not None and before[0] == (header.epoch, header.sequence)
        early = seconds_early(before[1] if before else None, time.monotonic(), self._interval)
        if early and not repeated and not await asyncio.to_thread(self._knows, header):
            raise RefusedError(
                "too_soon",
                f"worker {header.worker!r} pushed to {header.expert!r} less than {self._interval:g} s ago.",
                f"Push again in {early:.1f} s; the least interval is min_sync_interval of GET /federation.",
                retry_after=math.ceil(early),
                seconds_left=round(early, 3),
            )
        return not (early or repeated or not self._interval)

    @asynccontextmanager
    async def enforced(self, header: UpdateHeader) -> AsyncIterator[None]:
        """Raises `RefusedError` for a push that is early; one that does not succeed does not count."""
        key, identity, now = (header.expert, header.worker), (header.epoch, header.sequence), time.monotonic()
        before = self._pushes.get(key)
        if not await self.check(header):
            yield
            return
        if len(self._pushes) >= _REMEMBERED:
            due = now - self._interval
            self._pushes = {sender: newest for sender, newest in self._pushes.items() if newest[1] > due}
        push = self._pushes[key] = (identity, now)
        try:
            yield
        except BaseException:
            if self._pushes.get(key) == push:
                self._pushes.pop(key)
                if before is not None:
                    self._pushes[key] = before
            raise
