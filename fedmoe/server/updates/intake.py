"""Intake of updates and data statistics: body received, checked, stored, decided, answered.

receive (capped, hashed, on disk) -> check against the manifest -> fsync and rename -> decide and journal -> publish ->
answer. Each step either finishes or leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

import structlog

from fedmoe.coordinator import CentralCoordinator
from fedmoe.lora.adapter import Layout
from fedmoe.lora.codec import decode
from fedmoe.lora.safetensors_bytes import CodecError, MalformedError
from fedmoe.runtime import failpoints
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.base_history import CurrentHistory
from fedmoe.server.statistics.data_statistics import DataStatisticsStore, body_limit, refuse_suspect
from fedmoe.server.storage.blobs import BlobStore, BlobWriter, StorageFailedError
from fedmoe.server.storage.journal import Journal
from fedmoe.server.updates.committer import Committer
from fedmoe.server.updates.in_flight import CrashMarkers, InFlightBody
from fedmoe.server.updates.landing import ReceivedUpdate, UpdateDecider
from fedmoe.server.updates.memory_budget import MemoryBudget, SerialQueue
from fedmoe.server.updates.upload import (
    ExpectedBody,
    log_update,
    opened_writer,
    receive,
    settled,
    submission_of,
    usable_norm,
)
from fedmoe.server.updates.worker_leases import WorkerLeases
from fedmoe.wire.contract.messages import DataStatisticsHeader, DataStatisticsResult, UpdateHeader, UpdateResult

Result = TypeVar("Result")

_log = structlog.get_logger("fedmoe.coordinator")

# A body is the factors in float32 at most, plus the header of names.
_CAP_SHARE = 1.05
_CAP_BYTES = 1 << 20
#: Updates being checked and decided at once, as float32: four of rank 16 for SmolLM2-135M, or one that is larger.
_CHECKED_BYTES = 80 << 20


@dataclass(frozen=True, slots=True)
class Body:
    """An update's body on its way in: the chunks, the declared length if any, and the promised sha256 (hex)."""

    chunks: AsyncIterator[bytes]
    length: int | None
    sha256: str


class UpdateIntake:
    """Takes updates and data statistics in; `pool` runs what blocks, `clock` gives seconds since 1970."""

    def __init__(
        self,
        coordinator: CentralCoordinator,
        journal: Journal,
        blobs: BlobStore,
        statistics: DataStatisticsStore,
        decider: UpdateDecider,
        committer: Committer,
        in_flight: CrashMarkers,
        leases: WorkerLeases,
        pool: Executor,
        clock: Callable[[], float],
    ) -> None:
        self._coordinator = coordinator
        self._journal = journal
        self._blobs = blobs
        self._statistics = statistics
        self._decider = decider
        self._committer = committer
        self._in_flight = in_flight
        self._leases = leases
        self._pool = pool
        self._clock = clock
        #: Updates on their way in.
        self.uploads = 0
        self._memory = MemoryBudget(_CHECKED_BYTES)
        # Statistics are merged with all others of their expert, by the threads that uploads need too.
        self._merging = SerialQueue()

    @property
    def _current(self) -> CurrentHistory:
        return self._decider.current

    def knows(self, header: UpdateHeader) -> bool:
        """Whether this very update has been taken in before."""
        identity = (header.worker, header.epoch, header.sequence)
        return self._coordinator.quarantine.knows(identity) or self._journal.find_update(*identity) is not None

    async def push(self, header: UpdateHeader, body: Body, token: str = "") -> UpdateResult:
        """Take one update in; answers the same to the same update however often it is sent.

        `token` is the hash of the sender's token: what is held of the updates that came with one is bounded.
        """
        expert = self._coordinator.expert(header.expert)
        if expert.retired and not await self._in_thread(lambda: self.knows(header)):
            expert.require_active()
        self._leases.check(header, token)
        try:
            result = await self._received(
                header, lambda layout, writer: self._take(header, body, layout, writer, token)
            )
        except RefusedError as error:
            if error.code == "sequence_reused":
                self._leases.cloned(header)
            raise
        note = self._leases.warning(header.expert, header.worker)
        return result.model_copy(update={"note": f"{result.note} {note}".strip()}) if note else result

    async def push_data_statistics(
        self, header: DataStatisticsHeader, body: Body, token: str = ""
    ) -> DataStatisticsResult:
        """Take in statistics of a worker's data; the same bytes again change nothing."""
        self._coordinator.expert(header.expert).require_active()
        return await self._received(
            header, lambda layout, writer: self._take_statistics(header, body, layout, writer, token)
        )

    async def _received(
        self,
        header: UpdateHeader | DataStatisticsHeader,
        take: Callable[[Layout, BlobWriter], Awaitable[Result]],
    ) -> Result:
        """What `take` makes of a body that arrives for an expert; nothing is left of one that is refused."""
        self._committer.check_storage()
        expert = self._coordinator.expert(header.expert)
        self.uploads += 1
        try:
            writer = await opened_writer(self._blobs, self._pool)
            try:
                return await take(expert.manifest.layout, writer)
            finally:
                await self._in_thread(writer.abort)
        except (RefusedError, CodecError) as error:
            code = getattr(error, "code", "refused")
            _log.warning("refused", expert=header.expert, worker=header.worker, code=code, reason=str(error))
            raise
        except StorageFailedError as error:
            self._committer.fail(str(error))
            raise
        finally:
            self.uploads -= 1

    async def _take(
        self, header: UpdateHeader, body: Body, layout: Layout, writer: BlobWriter, token: str
    ) -> UpdateResult:
        expected = ExpectedBody(int(layout.size * 4 * _CAP_SHARE) + _CAP_BYTES, body.length, body.sha256)
        await receive(body.chunks, expected, writer, self._pool)
        failpoints.reached("push.received")
        marked = InFlightBody(writer.digest, header.expert, header.worker, header.sequence, writer.size)
        # From here to the end the update's numbers are in memory.
        async with self._memory.of(layout.size * 4):
            with self._in_flight.processing(marked):
                update = await self._in_thread(lambda: self._check(header, writer, layout, token))
                failpoints.reached("push.checked")
                if update.delta is not None or update.suspicion:
                    await self._in_thread(writer.commit)
                    failpoints.reached("push.stored")
                result = await self._committer.decided(
                    lambda transaction: self._decider.land(transaction, update, self._clock())
                )
        failpoints.reached("push.answered")
        self._leases.pushed(header, token)
        log_update(header, result)
        return result

    def _check(self, header: UpdateHeader, writer: BlobWriter, layout: Layout, token: str) -> ReceivedUpdate:
        """The update and its delta, if the body is one that could land; no delta if its number is taken.

        What cannot land is refused before it costs a write; the binding decision comes later, in order.
        """
        if self.knows(header):
            return ReceivedUpdate(header, submission_of(header, writer.digest), None, writer.size, token)
        if writer.size == 0:
            raise MalformedError("the body is empty")
        self._current.check_update(header, self._coordinator.expert(header.expert))
        suspicion = self._in_flight.suspicion(writer.digest)
        if suspicion:
            submission, flat = submission_of(header, writer.digest), None
        else:
            failpoints.reached("push.checking")
            flat = decode(writer.view(), layout).flat
            submission = submission_of(header, writer.digest, usable_norm(layout, flat))
        transaction = self._coordinator.transaction()
        transaction.hold(transaction.admit(submission, self._clock()), writer.size, token, suspicion)
        return ReceivedUpdate(header, submission, flat, writer.size, token, suspicion)

    async def _take_statistics(
        self, header: DataStatisticsHeader, body: Body, layout: Layout, writer: BlobWriter, token: str
    ) -> DataStatisticsResult:
        expected = ExpectedBody(body_limit(header.kind, layout), body.length, body.sha256)
        await receive(body.chunks, expected, writer, self._pool)
        if writer.size == 0:
            raise MalformedError("the body is empty")
        refuse_suspect(self._in_flight.suspicion(writer.digest))
        marked = InFlightBody(writer.digest, header.expert, header.worker, 0, writer.size)
        async with self._merging.turn(token):
            with self._in_flight.processing(marked):
                failpoints.reached("statistics.checking")
                await self._in_thread(lambda: self._statistics.check(header, writer.view(), layout))
                digest = await self._in_thread(writer.commit)
                result = await self._committer.decided(
                    lambda transaction: self._statistics.keep(transaction, header, digest, writer.size, self._clock()),
                    alone=True,
                )
        _log.info("statistics", worker=header.worker, **result.model_dump(exclude={"gateway_version"}))
        return result

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await settled(asyncio.get_running_loop().run_in_executor(self._pool, call))
