"""The coordinator service without HTTP: takes updates in, and answers every other request.

receive (capped, hashed, on disk) -> check against the manifest -> fsync and rename -> decide and journal -> publish ->
answer. Each step either finishes or leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import structlog

from fedmoe import __version__
from fedmoe.coordinator import CentralCoordinator, GatewayModel, Transaction
from fedmoe.experts import ExpertModel, Registrant, first_name
from fedmoe.federation.events import GatewayMerged, HeldUpdateRejected, QuarantineEvent
from fedmoe.lora.adapter import Layout
from fedmoe.lora.codec import WIRE_DTYPES, decode
from fedmoe.lora.safetensors_bytes import CodecError, MalformedError
from fedmoe.runtime import failpoints
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.security import Principal
from fedmoe.server.expert_names import gateway_by_title
from fedmoe.server.gate.gate import EvaluationGate, GatePolicy
from fedmoe.server.gate.publication import Publications
from fedmoe.server.history.base_history import current_history
from fedmoe.server.history.history import History
from fedmoe.server.listing import ExpertEntries
from fedmoe.server.registrations import RegistrationLimits, checked_manifest
from fedmoe.server.statistics.contributors import Contributors
from fedmoe.server.statistics.data_statistics import DataStatistics, body_limit, refuse_suspect
from fedmoe.server.statistics.reported_statistics import ReportedStatistics
from fedmoe.server.storage.blobs import BlobStore, BlobWriter, FolderBlobStore, StorageFailedError
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.reported_statistics import Statistic
from fedmoe.server.updates.committer import Committer
from fedmoe.server.updates.held_updates import HeldUpdates
from fedmoe.server.updates.in_flight import InFlight, InFlightBody
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
from fedmoe.server.upkeep.background_merge import BackgroundMerge
from fedmoe.server.upkeep.erasure import Erasure
from fedmoe.server.upkeep.retention import Retention
from fedmoe.server.upkeep.undo import Undo
from fedmoe.server.upkeep.withdrawal import Withdrawals
from fedmoe.wire.contract.messages import (
    ChangeResult,
    DataStatisticsHeader,
    DataStatisticsResult,
    FederationInfo,
    ManifestMessage,
    RegisterRequest,
    RetractRequest,
    RollbackRequest,
    StatisticRequest,
    UpdateHeader,
    UpdateResult,
)

Result = TypeVar("Result")

_log = structlog.get_logger("fedmoe.coordinator")

# A body is the factors in float32 at most, plus the header of names.
_CAP_SHARE = 1.05
_CAP_BYTES = 1 << 20
_THREADS = 4
# A gateway of more experts than this is not built while a list waits for it.
_MANY = 32
# After such a build the next one waits so many times as long as it took.
_REST = 20.0
# Who calls the service itself, without a request.
_OPERATOR = Principal("admin")
#: Updates being checked and decided at once, as float32: four of rank 16 for SmolLM2-135M, or one that is larger.
_CHECKED_BYTES = 80 << 20


@dataclass(frozen=True, slots=True)
class Body:
    """An update's body on its way in: the chunks, the declared length if any, and the promised sha256 (hex)."""

    chunks: AsyncIterator[bytes]
    length: int | None
    sha256: str


class CoordinatorService:
    """Everything the coordinator does for its callers; owns the threads, not the journal or the blobs."""

    def __init__(
        self,
        coordinator: CentralCoordinator,
        journal: Journal,
        blobs: BlobStore,
        history: History,
        min_sync_interval: float = 1.0,
        clock: Callable[[], float] = time.time,
        gate_policy: GatePolicy | None = None,
        storage_problem: Callable[[], str | None] = lambda: None,
        limits: RegistrationLimits | None = None,
        in_flight: InFlight | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.coordinator = coordinator
        self.journal = journal
        #: Who pushes under which worker's id.
        self.leases = WorkerLeases(monotonic)
        self.roster = Contributors(self.leases.following(history.events_at_start()), journal.statistics())
        self.reported = ReportedStatistics(journal)
        self.statistics = DataStatistics(journal, blobs)
        #: Which history this is, so that an update of another one is not taken for one of it.
        self.current = current_history(journal)
        self._landing = UpdateDecider(journal, self.current)
        self._blobs = blobs
        self._history = history
        self._min_sync_interval = min_sync_interval
        self._limits = limits or RegistrationLimits()
        self._clock = clock
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fedmoe-upload")
        self._committer = Committer(coordinator, journal, self._after_commit, storage_problem)
        self._in_flight = in_flight or InFlight(None)
        self.held = HeldUpdates(coordinator, blobs, self._committer, self._landing, self._in_flight, clock)
        self._undo = Undo(coordinator, history, self._committer, self.current, clock)
        erasure = Erasure(journal, blobs, history, self.statistics, self.reported, self.roster)
        self._withdrawals = Withdrawals(coordinator, journal, self._committer, self._undo, erasure, clock)
        self._folding = BackgroundMerge(coordinator, history, blobs, self._committer, clock)
        #: What decides which gateway goes out; None where every one does.
        self.evaluation_gate = (
            EvaluationGate(
                coordinator, journal, Publications(journal, blobs), gate_policy or GatePolicy(), clock, self.fail
            )
            if coordinator.aggregation.evaluation_gate
            else None
        )
        #: What bounds the bytes of updates; None where nothing does.
        self.retention: Retention | None = None
        #: Told of the first expert there is, once.
        self.on_first_expert: Callable[[ExpertModel], None] | None = None
        #: Updates on their way in.
        self.uploads = 0
        self._memory = MemoryBudget(_CHECKED_BYTES)
        # Statistics are merged with all others of their expert, by the threads that uploads need too.
        self._merging = SerialQueue()
        self._noted: tuple[str, ...] = ()
        self._build_again = 0.0
        #: The experts as lists show them.
        self.entries = ExpertEntries(self.roster)

    def keep_below(self, most: int, blobs: FolderBlobStore) -> None:
        """Let the oldest updates' bytes go, from `start` on, so that they are at most so many."""
        self.retention = Retention(
            self.coordinator, self.journal, blobs, self._history, self._committer, most, self._clock
        )

    def start(self) -> None:
        self._committer.start()
        self._withdrawals.finish()
        self._folding.start()
        if self.retention is not None:
            self.retention.start()
        if self.evaluation_gate is not None:
            self.evaluation_gate.start()

    def close(self) -> None:
        """Finish what was accepted, then stop the threads."""
        if self.evaluation_gate is not None:
            self.evaluation_gate.close()
        self._folding.close()
        if self.retention is not None:
            self.retention.close()
        self._undo.close()
        self._committer.close()
        self._pool.shutdown()

    @property
    def failed(self) -> str | None:
        """Why storage can no longer be trusted; None while all is well."""
        return self._committer.failed

    @property
    def not_ready(self) -> str | None:
        """Why nothing can be pushed, in words for anybody; None while it can."""
        if self.failed:
            return "storage failed; the coordinator's log says why"
        return None if self._committer.running else "the coordinator is starting or stopping"

    def check_storage(self) -> None:
        """Raise `StorageFailedError`, now and from now on, if the state is no longer where it was opened."""
        self._committer.check_storage()

    def fail(self, reason: str) -> None:
        """Accept nothing from now on."""
        self._committer.fail(reason)

    @property
    def now(self) -> float:
        return self._clock()

    def federation(self) -> FederationInfo:
        """What a worker must know before it loads a model."""
        manifest = self.coordinator.manifest
        return FederationInfo(
            fedmoe=__version__,
            manifest=ManifestMessage.of(manifest) if manifest else None,
            min_sync_interval=self._min_sync_interval,
            wire_dtypes=list(WIRE_DTYPES),
            start_from=self.coordinator.aggregation.start_from,
            merge_after=self.coordinator.aggregation.merge_after,
        )

    async def register(self, request: RegisterRequest, principal: Principal = _OPERATOR) -> ExpertModel:
        """Make the expert, or give the one there is; `principal` is who asks, and may not have too many."""
        manifest = checked_manifest(request.manifest, self.coordinator.manifest)

        def decide(transaction: Transaction) -> ExpertModel:
            transaction.aggregation.check_start(request.start_from)
            by = Registrant(request.worker, principal.token)
            self._limits.check(
                transaction.experts,
                first_name(transaction.experts, request.expert),
                manifest,
                by,
                principal.role == "admin",
            )
            return transaction.register(request.expert, by.worker, manifest, request.seed, self.now, by.token)

        expert = await self._decided(self._committer.submit(decide), ExpertModel)
        _log.info("registered", expert=expert.name, worker=request.worker, version=expert.version)
        tell, self.on_first_expert = self.on_first_expert, None
        if tell is not None:
            tell(expert)
        return expert

    @property
    def has_gateway(self) -> bool:
        """Whether there is one to serve; with an evaluation gate there is none before it let one out."""
        return self.evaluation_gate is None or self.evaluation_gate.has_published

    def gateway(self) -> GatewayModel:
        """The published gateway, or without a gate that of the newest state; says where it was not made as told."""
        gateway = self.coordinator.gateway() if self.evaluation_gate is None else self.evaluation_gate.published()
        gateway = self._shown(gateway)
        if gateway.notes != self._noted:
            for note in gateway.notes:
                _log.warning("gateway", version=gateway.version, strategy=gateway.strategy, note=note)
            self._noted = gateway.notes
        return gateway

    def _shown(self, gateway: GatewayModel) -> GatewayModel:
        """With the digests of its sources, under the names that experts go by."""
        if gateway.sources and not gateway.source_digests:
            gateway = replace(gateway, source_digests=self.current.digests(gateway.sources))
        return gateway_by_title(gateway, self.coordinator.experts)

    def listed_gateway(self) -> GatewayModel:
        """The gateway as a list shows it: of many experts the one built last, while the newest is built meanwhile."""
        built = self.coordinator.built
        if self.evaluation_gate is not None or built is None or len(built.sources) <= _MANY:
            return self.gateway()
        if built.version != self.coordinator.gateway_version and time.monotonic() >= self._build_again:
            self._build_again = math.inf  # one at a time
            self._pool.submit(self._build)
        return self._shown(built)

    def _build(self) -> None:
        """Build the newest gateway for those who list it, and leave the processor to others for a while."""
        began = time.monotonic()
        try:
            self.gateway()
        finally:
            ended = time.monotonic()
            self._build_again = ended + _REST * (ended - began)

    def knows(self, header: UpdateHeader) -> bool:
        """Whether this very update has been taken in before."""
        identity = (header.worker, header.epoch, header.sequence)
        return self.coordinator.quarantine.knows(identity) or self.journal.find_update(*identity) is not None

    async def push(self, header: UpdateHeader, body: Body, token: str = "") -> UpdateResult:
        """Take one update in; answers the same to the same update however often it is sent.

        `token` is the hash of the sender's token: what is held of the updates that came with one is bounded.
        """
        expert = self.coordinator.expert(header.expert)
        if expert.retired and not await self._in_thread(lambda: self.knows(header)):
            expert.require_active()
        self.leases.check(header, token)
        try:
            result = await self._received(
                header, lambda layout, writer: self._take(header, body, layout, writer, token)
            )
        except RefusedError as error:
            if error.code == "sequence_reused":
                self.leases.cloned(header)
            raise
        note = self.leases.warning(header.expert, header.worker)
        return result.model_copy(update={"note": f"{result.note} {note}".strip()}) if note else result

    async def push_data_statistics(
        self, header: DataStatisticsHeader, body: Body, token: str = ""
    ) -> DataStatisticsResult:
        """Take in what a worker tells of its data; the same bytes again change nothing."""
        self.coordinator.expert(header.expert).require_active()
        return await self._received(
            header, lambda layout, writer: self._take_statistics(header, body, layout, writer, token)
        )

    async def _received(
        self,
        header: UpdateHeader | DataStatisticsHeader,
        take: Callable[[Layout, BlobWriter], Awaitable[Result]],
    ) -> Result:
        """What `take` makes of a body that arrives for an expert; nothing is left of one that is refused."""
        self.check_storage()
        expert = self.coordinator.expert(header.expert)
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
            self.fail(str(error))
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
        async with self._memory.of(layout.size * 4):
            with self._in_flight.processing(marked):
                result = await self._judged(header, writer, layout, token)
        failpoints.reached("push.answered")
        self.leases.pushed(header, token)
        log_update(header, result)
        return result

    async def _judged(self, header: UpdateHeader, writer: BlobWriter, layout: Layout, token: str) -> UpdateResult:
        """Check, store and decide on an update that has arrived; from here to the end its numbers are in memory."""
        arrived = await self._in_thread(lambda: self._check(header, writer, layout, token))
        failpoints.reached("push.checked")
        if arrived.delta is not None or arrived.suspicion:
            await self._in_thread(writer.commit)
            failpoints.reached("push.stored")
        future = self._committer.submit(lambda transaction: self._landing.land(transaction, arrived, self.now))
        return await self._decided(future, UpdateResult)

    async def _take_statistics(
        self, header: DataStatisticsHeader, body: Body, layout: Layout, writer: BlobWriter, token: str
    ) -> DataStatisticsResult:
        await receive(
            body.chunks, ExpectedBody(body_limit(header.kind, layout), body.length, body.sha256), writer, self._pool
        )
        if writer.size == 0:
            raise MalformedError("the body is empty")
        refuse_suspect(self._in_flight.suspicion(writer.digest))
        marked = InFlightBody(writer.digest, header.expert, header.worker, 0, writer.size)
        async with self._merging.turn(token):
            with self._in_flight.processing(marked):
                failpoints.reached("statistics.checking")
                await self._in_thread(lambda: self.statistics.check(header, writer.view(), layout))
                digest = await self._in_thread(writer.commit)
                future = self._committer.submit(
                    lambda transaction: self.statistics.keep(transaction, header, digest, writer.size, self.now),
                    alone=True,
                )
                result = await self._decided(future, DataStatisticsResult)
        _log.info("statistics", worker=header.worker, **result.model_dump(exclude={"gateway_version"}))
        return result

    def _check(self, header: UpdateHeader, writer: BlobWriter, layout: Layout, token: str) -> ReceivedUpdate:
        """The update and its delta, if the body is one that could land; no delta if its number is taken.

        What cannot land is refused before it costs a write; the binding decision comes later, in order.
        """
        identity = (header.worker, header.epoch, header.sequence)
        if self.coordinator.quarantine.knows(identity) or self.journal.find_update(*identity) is not None:
            return ReceivedUpdate(header, submission_of(header, writer.digest), None, writer.size, token)
        if writer.size == 0:
            raise MalformedError("the body is empty")
        self.current.check_update(header, self.coordinator.expert(header.expert))
        suspicion = self._in_flight.suspicion(writer.digest)
        if suspicion:
            submission, flat = submission_of(header, writer.digest), None
        else:
            failpoints.reached("push.checking")
            flat = decode(writer.view(), layout).flat
            submission = submission_of(header, writer.digest, usable_norm(layout, flat))
        transaction = self.coordinator.transaction()
        transaction.hold(transaction.admit(submission, self.now), writer.size, token, suspicion)
        return ReceivedUpdate(header, submission, flat, writer.size, token, suspicion)

    async def roll_back(self, request: RollbackRequest) -> ChangeResult:
        """The expert's next version gets the content of an earlier one."""
        return await self._undo.roll_back(request)

    async def retract(self, request: RetractRequest) -> ChangeResult:
        """The expert's next version is what it would be without one worker's updates."""
        return await self._undo.retract(request)

    async def withdraw(self, request: RetractRequest) -> ChangeResult:
        """Retract a worker, if that is not done yet, and remove its bytes for good."""
        return await self._withdrawals.withdraw(request)

    async def add_statistic(self, request: StatisticRequest) -> None:
        """Keep a small fact a worker discloses."""
        self.coordinator.expert(request.expert).require_active()
        self.check_storage()
        statistic = Statistic(request.expert, request.worker, request.kind, dict(request.values), self.now)
        await self._in_thread(lambda: self.reported.add(statistic))
        self.roster.hear(statistic)

    async def change_experts(self, change: Callable[[Transaction], ExpertModel]) -> ExpertModel:
        """Rename, retire or bring back an expert."""
        return await self._decided(self._committer.submit(change), ExpertModel)

    async def _decided(self, future: Future[object], kind: type[Result]) -> Result:
        # A cancelled request still waits for its decision: the bytes it stored must stay until they are journalled.
        result = await settled(asyncio.wrap_future(future))
        assert isinstance(result, kind), f"a decision gave {type(result)}, expected {kind}"
        return result

    async def _in_thread(self, call: Callable[[], Result]) -> Result:
        return await settled(asyncio.get_running_loop().run_in_executor(self._pool, call))

    def _after_commit(self, transaction: Transaction) -> None:
        self.roster.observe(transaction.events)
        if self.retention is not None:
            self.retention.observe(transaction.events)
        for rejected in [event for event in transaction.events if isinstance(event, HeldUpdateRejected)]:
            self._history.delete_rejected(rejected.digest)
        for name in {
            event.expert for event in transaction.events if not isinstance(event, GatewayMerged | QuarantineEvent)
        }:
            self._history.snapshot_if_due(self.coordinator.experts[name])
        if transaction.online_gateway is not None:
            if any(isinstance(event, GatewayMerged) for event in transaction.events):
                self._history.prune_gateways(transaction.online_gateway)
            self._folding.wake()
