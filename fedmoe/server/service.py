"""The coordinator service without HTTP: wires its parts, and answers all requests but pushes (`updates.intake`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import structlog

from fedmoe import __version__
from fedmoe.coordinator import CentralCoordinator, GatewayModel, GatewayPlan, Transaction
from fedmoe.experts import ExpertModel, Registrant, first_name
from fedmoe.federation.events import GatewayMerged, HeldUpdateRejected, QuarantineEvent
from fedmoe.lora.codec import WIRE_DTYPES
from fedmoe.server.access.security import Principal
from fedmoe.server.expert_names import gateway_by_title
from fedmoe.server.gate.gate import EvaluationGate, GatePolicy
from fedmoe.server.gate.publication import Publications
from fedmoe.server.history.base_history import CurrentHistory
from fedmoe.server.history.history import History
from fedmoe.server.listing import ExpertEntries
from fedmoe.server.registrations import RegistrationLimits, checked_manifest
from fedmoe.server.statistics.contributors import Contributors, held_out_of
from fedmoe.server.statistics.data_statistics import DataStatisticsStore
from fedmoe.server.statistics.reported_statistics import ReportedStatistics
from fedmoe.server.status.activity import Activity
from fedmoe.server.status.heartbeats import Heartbeats
from fedmoe.server.storage.blobs import BlobStore
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.records import Statistic
from fedmoe.server.updates.committer import Committer
from fedmoe.server.updates.in_flight import CrashMarkers
from fedmoe.server.updates.intake import UpdateIntake
from fedmoe.server.updates.upload import in_thread
from fedmoe.server.updates.worker_leases import WorkerLeases
from fedmoe.server.upkeep.background_merge import BackgroundMerge
from fedmoe.server.upkeep.erasure import Withdrawals
from fedmoe.server.upkeep.retention import Retention
from fedmoe.server.upkeep.undo import Undo
from fedmoe.wire.contract.messages import FederationInfo, ManifestMessage, RegisterRequest, StatisticRequest

_Plan = TypeVar("_Plan", bound=GatewayPlan)

_log = structlog.get_logger("fedmoe.coordinator")

_THREADS = 4
# Who calls the service itself, without a request.
_OPERATOR = Principal("admin")


class CoordinatorService:
    """Everything the coordinator does for its callers; owns its threads, but neither journal nor blobs."""

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
        in_flight: CrashMarkers | None = None,
        max_length: int | None = None,
    ) -> None:
        self.coordinator = coordinator
        self.journal, self.blobs = journal, blobs
        #: Who pushes under which worker's id.
        self.leases = WorkerLeases(time.monotonic)
        #: What happened lately, and what workers say of themselves.
        self.activity = Activity(lambda: self.intake.stored_bytes)
        self.heartbeats = Heartbeats()
        events = self.activity.following(self.leases.following(history.events_at_start()))
        self.roster = Contributors(events, journal.statistics())
        #: The experts as lists show them.
        self.entries = ExpertEntries(self.roster)
        self.reported = ReportedStatistics(journal)
        self.statistics = DataStatisticsStore(journal, blobs)
        #: Which history this is, so that an update of another one is not taken for one of it.
        self.current = CurrentHistory(journal)
        self.committer = Committer(coordinator, journal, clock, self._after_commit, storage_problem)
        self._history = history
        self._min_sync_interval, self._max_length = min_sync_interval, max_length
        self._limits = limits or RegistrationLimits()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fedmoe-upload")
        markers = in_flight or CrashMarkers(None)
        self.intake = UpdateIntake(
            self.committer, blobs, self.current, self.statistics, markers, self.leases, self._pool
        )
        self.undo = Undo(self.committer, history, self.current)
        self.withdrawals = Withdrawals(
            self.committer, self.undo, history, blobs, self.statistics, self.reported, self.roster
        )
        self._background_merge = BackgroundMerge(self.committer, history, blobs)
        #: Decides which gateway is published; None where every one is.
        self.evaluation_gate: EvaluationGate | None = None
        if coordinator.aggregation.evaluation_gate:
            publications, policy = Publications(journal, blobs), gate_policy or GatePolicy()
            fail = self.committer.fail
            self.evaluation_gate = EvaluationGate(coordinator, journal, publications, policy, clock, fail)
        #: Bounds the bytes of updates; None where nothing does.
        self.retention: Retention | None = None
        #: Called with the first expert there is, once.
        self.on_first_expert: Callable[[ExpertModel], None] | None = None
        #: How long the newest gateway took; None before the first one.
        self.gateway_build_seconds: float | None = None
        self._noted: tuple[str, ...] = ()

    def keep_below(self, most: int, blobs: BlobStore) -> None:
        """Keep at most so many bytes of updates, from `start` on: the oldest are deleted."""
        self.retention = Retention(self.committer, self._history, blobs, most)

    def start(self) -> None:
        self.committer.start()
        self.withdrawals.finish()
        self._background_merge.start()
        if self.retention is not None:
            self.retention.start()
        if self.evaluation_gate is not None:
            self.evaluation_gate.start()

    def close(self) -> None:
        """Finish what was accepted, then stop the threads."""
        if self.evaluation_gate is not None:
            self.evaluation_gate.close()
        self._background_merge.close()
        if self.retention is not None:
            self.retention.close()
        self.undo.close()
        self.committer.close()
        self._pool.shutdown()

    @property
    def not_ready(self) -> str | None:
        """Why nothing can be pushed, in words without secrets; None while it can."""
        if self.committer.failed:
            return "storage failed; the coordinator's log says why"
        return None if self.committer.running else "the coordinator is starting or stopping"

    @property
    def now(self) -> float:
        return self.committer.clock()

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
            max_length=self._max_length,
        )

    async def register(self, request: RegisterRequest, principal: Principal = _OPERATOR) -> ExpertModel:
        """Make the expert, or return the one there is; `principal` is the caller, whose experts are limited."""
        manifest = checked_manifest(request.manifest, self.coordinator.manifest)

        def decide(transaction: Transaction) -> ExpertModel:
            transaction.aggregation.check_start(request.start_from)
            experts, by = transaction.experts, Registrant(request.worker, principal.token)
            first = first_name(experts, request.expert)
            self._limits.check(experts, first, manifest, by, admin=principal.role == "admin")
            return transaction.register(request.expert, by.worker, manifest, request.seed, self.now, by.token)

        expert = await self.committer.decided(decide)
        _log.info("registered", expert=expert.name, worker=request.worker, version=expert.version)
        callback, self.on_first_expert = self.on_first_expert, None
        if callback is not None:
            callback(expert)
        return expert

    @property
    def has_gateway(self) -> bool:
        """Whether there is one to serve; with an evaluation gate there is none before it let one out."""
        return self.evaluation_gate is None or self.evaluation_gate.has_published

    def gateway(self) -> GatewayModel:
        """The published gateway with its weights, or without a gate the newest, which is merged now."""
        gateway = self._newest_gateway() if self.evaluation_gate is None else self.evaluation_gate.published()
        return self._shown(gateway)

    def gateway_plan(self) -> GatewayPlan:
        """What the published gateway is made of, or without a gate the newest; nothing is merged for it."""
        gate = self.evaluation_gate
        return self._shown(self.coordinator.gateway_plan() if gate is None else gate.published())

    def _newest_gateway(self) -> GatewayModel:
        before, began = self.coordinator.built, time.monotonic()
        gateway = self.coordinator.gateway()
        if gateway is not before:
            self.gateway_build_seconds = time.monotonic() - began
        return gateway

    def _shown(self, gateway: _Plan) -> _Plan:
        """The gateway with the digests of its sources, under its experts' newest names.

        Logs where it is not made as the options say.
        """
        if gateway.notes != self._noted:
            for note in gateway.notes:
                _log.warning("gateway", version=gateway.version, strategy=gateway.strategy, note=note)
            self._noted = gateway.notes
        if gateway.sources and not gateway.source_digests:
            gateway = replace(gateway, source_digests=self.current.digests(gateway.sources))
        return gateway_by_title(gateway, self.coordinator.experts)

    async def add_statistic(self, request: StatisticRequest) -> None:
        """Keep a statistic that a worker reports."""
        self.coordinator.expert(request.expert).require_active()
        self.committer.check_storage()
        statistic = Statistic(request.expert, request.worker, request.kind, dict(request.values), self.now)
        await in_thread(self._pool, lambda: self.reported.add(statistic))
        self.roster.hear(statistic)
        if (held_out := held_out_of(statistic)) is not None:
            version = self.coordinator.experts[request.expert].version
            self.activity.measured(request.expert, statistic.at, version, held_out)

    def _after_commit(self, transaction: Transaction) -> None:
        self.roster.observe(transaction.events)
        self.activity.observe(transaction.events)
        if self.retention is not None:
            self.retention.observe(transaction.events)
        for event in transaction.events:
            if isinstance(event, HeldUpdateRejected):
                self._history.delete_rejected(event.digest)
        of_experts = [event for event in transaction.events if not isinstance(event, GatewayMerged | QuarantineEvent)]
        for name in {event.expert for event in of_experts}:
            self._history.snapshot_if_due(self.coordinator.experts[name])
        if transaction.online_gateway is not None:
            if any(isinstance(event, GatewayMerged) for event in transaction.events):
                self._history.prune_gateways(transaction.online_gateway)
            self._background_merge.wake()
