"""Intake of updates and data statistics: body received, checked, stored, decided, answered.

receive (capped, hashed, on disk) -> check against the manifest -> fsync and rename -> decide and journal -> publish ->
answer. Each step either finishes or leaves nothing behind.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Executor
from contextlib import asynccontextmanager

import structlog

from fedmoe.coordinator import Submission
from fedmoe.lora.adapter import Layout
from fedmoe.lora.codec import decode
from fedmoe.lora.safetensors_bytes import CodecError, MalformedError
from fedmoe.runtime import failpoints
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.base_history import CurrentHistory
from fedmoe.server.statistics.data_statistics import DataStatisticsStore, body_limit, refuse_suspect
from fedmoe.server.storage.blobs import BlobStore, BlobWriter, CorruptBlobError, MissingBlobError, StorageFailedError
from fedmoe.server.updates.committer import Committer
from fedmoe.server.updates.in_flight import CrashMarkers, InFlightBody
from fedmoe.server.updates.update_decisions import ReceivedUpdate, UpdateDecider
from fedmoe.server.updates.upload import (
    Body,
    StoredBody,
    check_size,
    in_thread,
    opened_writer,
    receive,
    usable_norm,
)
from fedmoe.server.updates.worker_leases import WorkerLeases
from fedmoe.wire.contract.messages import DataStatisticsHeader, DataStatisticsResult, UpdateHeader, UpdateResult

_log = structlog.get_logger("fedmoe.coordinator")

# A body is the factors in float32 at most, plus the header of names.
_CAP_SHARE = 1.05
_CAP_BYTES = 1 << 20
#: Updates being checked and decided at once, as float32: four of rank 16 for SmolLM2-135M, or one that is larger.
_CHECKED_BYTES = 80 << 20


class UpdateIntake:
    """Takes in updates, pushed or released from quarantine, and data statistics; `pool` runs what blocks."""

    def __init__(
        self,
        committer: Committer,
        blobs: BlobStore,
        current: CurrentHistory,
        statistics: DataStatisticsStore,
        in_flight: CrashMarkers,
        leases: WorkerLeases,
        pool: Executor,
    ) -> None:
        self._committer = committer
        self._coordinator = committer.coordinator
        self._blobs = blobs
        self._current = current
        self._statistics = statistics
        self._decider = UpdateDecider(committer.journal, current)
        self._in_flight = in_flight
        self._leases = leases
        self._pool = pool
        #: Updates on their way in.
        self.uploads = 0
        #: Bytes of updates that landed or were held since the start.
        self.stored_bytes = 0
        self._memory = MemoryBudget(_CHECKED_BYTES)
        # Statistics are merged with all others of their expert, by the threads that uploads need too.
        self._merging = SerialQueue()

    def knows(self, header: UpdateHeader) -> bool:
        """Whether this very update has been taken in before."""
        identity = (header.worker, header.epoch, header.sequence)
        return self._coordinator.quarantine.knows(identity) or bool(self._committer.journal.find_update(*identity))

    async def push(self, header: UpdateHeader, body: Body, token: str = "") -> UpdateResult:
        """Take one update in; answers the same to the same update however often it is sent.

        `token` is the hash of the sender's token: what is held of the updates that came with one is bounded.
        """
        layout = await self.admit(header, token)
        try:
            async with self._received(header, body, update_limit(layout)) as writer:
                result = await self._landed(header, layout, writer, token)
        except RefusedError as error:
            if error.code == "sequence_reused":
                self._leases.cloned(header)
            raise
        note = self._leases.warning(header.expert, header.worker)
        return result.model_copy(update={"note": f"{result.note} {note}".strip()}) if note else result

    async def admit(self, header: UpdateHeader, token: str = "") -> Layout:
        """What an update of this header must look like; refuses what can be refused before its body is read."""
        expert = self._coordinator.expert(header.expert)
        if expert.retired and not await in_thread(self._pool, lambda: self.knows(header)):
            expert.require_active()
        self._leases.check(header, token)
        return expert.manifest.layout

    async def _landed(self, header: UpdateHeader, layout: Layout, writer: BlobWriter, token: str) -> UpdateResult:
        failpoints.reached("push.received")
        marked = InFlightBody(writer.digest, header.expert, header.worker, header.sequence, writer.size)
        # From here to the end the update's numbers are in memory.
        async with self._memory.of(layout.size * 4):
            with self._in_flight.processing(marked):
                update = await in_thread(self._pool, lambda: self._check(header, writer, layout, token))
                failpoints.reached("push.checked")
                if update.delta is not None or update.suspicion:
                    await in_thread(self._pool, writer.commit)
                    failpoints.reached("push.stored")
                result = await self._committer.decided(
                    lambda transaction: self._decider.land(transaction, update, self._committer.clock())
                )
        failpoints.reached("push.answered")
        self._leases.pushed(header, token)
        if not result.duplicate:
            self.stored_bytes += writer.size
        _log_update(header, result)
        return result

    def _check(self, header: UpdateHeader, writer: BlobWriter, layout: Layout, token: str) -> ReceivedUpdate:
        """The update and its delta, if the body is one that could land; no delta if its number is taken.

        What cannot land is refused before it costs a write; the binding decision comes later, in order.
        """
        if self.knows(header):
            return ReceivedUpdate(header, _submission(header, writer.digest), None, writer.size, token)
        if writer.size == 0:
            raise MalformedError("the body is empty")
        self._current.check_update(header, self._coordinator.expert(header.expert))
        suspicion = self._in_flight.suspicion(writer.digest)
        if suspicion:
            submission, flat = _submission(header, writer.digest), None
        else:
            failpoints.reached("push.checking")
            flat = decode(writer.view(), layout).flat
            submission = _submission(header, writer.digest, usable_norm(layout, flat))
        transaction = self._coordinator.transaction()
        transaction.hold(transaction.admit(submission, self._committer.clock()), writer.size, token, suspicion)
        return ReceivedUpdate(header, submission, flat, writer.size, token, suspicion)

    def release(self, number: int) -> UpdateResult:
        """Let a held update land, as if it had arrived now."""
        held = self._coordinator.quarantine.numbered(number)
        layout = self._coordinator.expert(held.expert).manifest.layout
        with self._in_flight.processing(InFlightBody(held.digest, held.expert, held.worker, held.sequence, held.size)):
            try:
                delta = decode(self._blobs.read(held.digest), layout).flat
            except (MissingBlobError, CorruptBlobError) as error:
                raise RefusedError(
                    "held_lost",
                    f"what update {number} holds cannot be read: {error}.",
                    "Restore a backup, or reject it.",
                ) from error
            usable_norm(layout, delta)
            result = self._committer.submit(
                lambda transaction: self._decider.release(transaction, number, delta, self._committer.clock())
            ).result()
        self._in_flight.forget(held.digest)
        _log.warning("released", held=number, expert=result.expert, version=result.version)
        return result

    def reject(self, number: int, reason: str) -> None:
        """Reject a held update: it never lands, its sender is informed, its bytes are deleted."""
        event = self._committer.submit(
            lambda transaction: transaction.reject(number, reason, self._committer.clock())
        ).result()
        _log.warning("rejected", held=event.held, expert=event.expert, worker=event.worker, sequence=event.sequence)

    async def push_data_statistics(
        self, header: DataStatisticsHeader, body: Body, token: str = ""
    ) -> DataStatisticsResult:
        """Take in statistics of a worker's data; the same bytes again change nothing."""
        expert = self._coordinator.expert(header.expert)
        expert.require_active()
        layout = expert.manifest.layout
        async with self._received(header, body, body_limit(header.kind, layout)) as writer:
            if writer.size == 0:
                raise MalformedError("the body is empty")
            refuse_suspect(self._in_flight.suspicion(writer.digest))
            marked = InFlightBody(writer.digest, header.expert, header.worker, 0, writer.size)
            async with self._merging.turn(token):
                with self._in_flight.processing(marked):
                    failpoints.reached("statistics.checking")
                    await in_thread(self._pool, lambda: self._statistics.check(header, writer.view(), layout))
                    digest = await in_thread(self._pool, writer.commit)
                    result = await self._committer.decided(
                        lambda transaction: self._statistics.keep(
                            transaction, header, digest, writer.size, self._committer.clock()
                        ),
                        alone=True,
                    )
            _log.info("statistics", worker=header.worker, **result.model_dump(exclude={"gateway_version"}))
        return result

    @asynccontextmanager
    async def _received(
        self, header: UpdateHeader | DataStatisticsHeader, body: Body, cap: int
    ) -> AsyncIterator[BlobWriter]:
        """A body of at most `cap` bytes that has arrived whole; nothing is left of one that is refused."""
        self._committer.check_storage()
        self.uploads += 1
        try:
            writer = StoredBody(self._blobs, body) if body.stored else await opened_writer(self._blobs, self._pool)
            try:
                if body.stored:
                    check_size(body.length, cap)
                else:
                    await receive(body, cap, writer, self._pool)
                yield writer
            finally:
                await in_thread(self._pool, writer.abort)
        except (RefusedError, CodecError) as error:
            code = getattr(error, "code", "refused")
            _log.warning("refused", expert=header.expert, worker=header.worker, code=code, reason=str(error))
            raise
        except StorageFailedError as error:
            self._committer.fail(str(error))
            raise
        finally:
            self.uploads -= 1


def update_limit(layout: Layout) -> int:
    """The most bytes that an update's body may have."""
    return int(layout.size * 4 * _CAP_SHARE) + _CAP_BYTES


def _submission(header: UpdateHeader, digest: str, norm: float | None = None) -> Submission:
    numbers = {"loss": header.loss, "steps": header.steps, "tokens": header.tokens}
    info = {name: float(value) for name, value in numbers.items() if value is not None}
    identity = (header.expert, header.worker, header.epoch, header.sequence)
    return Submission(*identity, header.base_version, digest, info, norm)


def _log_update(header: UpdateHeader, result: UpdateResult) -> None:
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


class MemoryBudget:
    """Bytes that are shared out in the order of asking; whoever asks for more than all of them gets them alone."""

    def __init__(self, total: int) -> None:
        self._total = self._free = total
        self._line = asyncio.Lock()
        self._given_back = asyncio.Event()

    @asynccontextmanager
    async def of(self, size: int) -> AsyncIterator[None]:
        """Have `size` bytes for as long as the context lasts."""
        taken = min(size, self._total)
        async with self._line:  # whoever is first waits here for room, the others for the lock: nobody is overtaken
            while self._free < taken:
                self._given_back.clear()
                await self._given_back.wait()
            self._free -= taken
        try:
            yield
        finally:
            self._free += taken
            self._given_back.set()


class SerialQueue:
    """Work that takes much memory, done one at a time; of each token one request stands in line, whatever it sends."""

    def __init__(self) -> None:
        self._all = asyncio.Lock()
        self._of: dict[str, asyncio.Lock] = {}

    @asynccontextmanager
    async def turn(self, token: str) -> AsyncIterator[None]:
        async with self._of.setdefault(token, asyncio.Lock()), self._all:
            yield
