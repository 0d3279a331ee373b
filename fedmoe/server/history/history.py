"""Recovery, snapshots, rollback and retraction, all by replay of the journal.

The same updates in the same order give the same bits, so a snapshot plus the updates after it equals a replay from the
start, and an expert without one worker is the replay without that worker's updates.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import structlog

from fedmoe.coordinator import Aggregation, CentralCoordinator, Transaction
from fedmoe.experts import ExpertModel, InitialWeights, Registrant
from fedmoe.federation.events import CountedUpdate, Event, EventInputs, UpdateAccepted, UpdateLost
from fedmoe.federation.lineage import Lineage, length, start, without_worker
from fedmoe.federation.online_gateway import BranchPoint, OnlineGateway, count_steps, step_counters
from fedmoe.federation.transitions import TRANSITIONS, binding_manifest, lineages
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.update_rules import USUAL_WINDOW, RuleState
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.gate.publication import published_blobs
from fedmoe.server.history.pruning import prune_plan
from fedmoe.server.history.replay import (
    MOST_LEFT_OUT,
    DamagedUpdateError,
    JournalledPast,
    Replay,
    left_in_the_gateway,
    made_version,
    past_of,
    registration,
    snapshot_bytes,
)
from fedmoe.server.statistics.data_statistics import DataStatisticsStore
from fedmoe.server.storage.blobs import BlobReferences, BlobStore, StorageFailedError, put
from fedmoe.server.storage.event_rows import GATEWAY, QUARANTINE, blob_of
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.released_bytes import why_released
from fedmoe.server.storage.start_options import check_options
from fedmoe.server.storage.tables import UPDATE_RULE

SNAPSHOT_EVERY = 50

_log = structlog.get_logger("fedmoe.history")


@dataclass(frozen=True)
class RebuiltState:
    """A state rebuilt from the journal, and how many updates of the newest version it lacks.

    `since` are its updates since the expert branched from the gateway, `note` says what could not be taken back,
    `version` is that newest version, and `erasures` how many there had been.
    """

    state: RuleState
    removed: int
    since: tuple[CountedUpdate, ...]
    note: str = ""
    version: int = 0
    erasures: int = 0


class History(Replay):
    """Recovers experts, rebuilds earlier states of them, keeps snapshots, prunes what is not needed."""

    def __init__(
        self,
        journal: Journal,
        blobs: BlobStore,
        aggregation: Aggregation,
        keep_updates: int | None = None,
        clock: Callable[[], float] = time.time,
        skip_damaged: bool = False,
    ) -> None:
        super().__init__(journal, blobs, aggregation)
        self._keep_updates = keep_updates
        self._clock = clock
        self._skip_damaged = skip_damaged
        self._read: list[Event] | None = None
        self._lost: list[UpdateLost] = []
        self._statistics = DataStatisticsStore(journal, blobs)
        self._recovered: CentralCoordinator | None = None
        #: Erasures since the start; what was rebuilt before one may be made of what is gone.
        self.erasures = 0

    def events_at_start(self) -> Iterable[Event]:
        """Every event in order: those that `recover` read, handed over once, or read now."""
        read, self._read = self._read, None
        return read if read is not None else self._journal.events()

    def recover(self) -> CentralCoordinator:
        """The coordinator as it was when the last acknowledged event was written.

        Raises StorageFailedError where what is on disk does not give what was journalled.
        """
        self._read = list(self._journal.events())
        past = past_of(self._read)
        rule = self._journal.meta(UPDATE_RULE)
        check_options(self._aggregation, rule, past.merges[-1].number if past.merges else None)
        if rule is None:
            self._journal.set_meta(UPDATE_RULE, self._aggregation.rule.name)
        if not self._blobs.shared:
            self._sweep(past)
        experts = {name: self._recover_whole(events) for name, events in past.experts.items()}
        self._journal_lost(experts)
        coordinator = CentralCoordinator(self._aggregation)
        for change in past.roll:
            after = TRANSITIONS[type(change)].expert
            assert after is not None, "a change of the roll changes an expert"
            experts[change.expert] = after(experts, change, EventInputs(self._aggregation.rule))
        manifest = binding_manifest(experts)
        online_gateway = self._recover_gateway(manifest, past) if manifest else None
        changes = sum(map(len, past.experts.values())) + len(past.merges) + len(past.roll)
        version = changes + self._statistics.moments_arrived()
        of_experts = {name: self._statistics.moments(name) for name in experts if self._aggregation.uses_moments}
        moments = {name: merged for name, merged in of_experts.items() if merged is not None}
        transaction = Transaction(
            self._aggregation, experts, manifest, version, [], moments, online_gateway, quarantine=past.quarantine
        )
        transaction.roll_changes = len(past.roll)
        coordinator.publish(transaction)
        self._recovered = coordinator
        return coordinator

    def quarantined_blobs(self) -> set[str]:
        """Blobs of updates that wait in quarantine."""
        return self._recovered.quarantine.digests() if self._recovered is not None else set()

    def delete_rejected(self, digest: str) -> None:
        """Delete a rejected update's bytes, unless something else needs the same; for the committer's thread."""
        needed = self.quarantined_blobs() | self._statistics.blobs().needed | published_blobs(self._journal).needed
        if digest not in needed | self._journal.named_elsewhere(QUARANTINE, {digest}):
            self._blobs.delete(digest)

    def _recover_gateway(self, manifest: Manifest, past: JournalledPast) -> OnlineGateway | None:
        """The online gateway, if there is one: the last merge's blob, and how far each expert is from it."""
        online_gateway = self._aggregation.first_gateway(manifest)
        if online_gateway is None:
            return None
        for merge in past.merges:
            online_gateway = online_gateway.merged(merge)
        if past.merges:
            weights = self._gateway_weights(past.merges[-1].digest, manifest)
            online_gateway = online_gateway.with_adapter(Adapter(manifest.layout, manifest.alpha, weights))
        for name, events in past.experts.items():
            chains = lineages(events)
            newest = chains[max(chains)]
            branch_point = BranchPoint(start(newest), count_steps(events, Lineage.updates(newest)))
            online_gateway = online_gateway.recovered(name, branch_point, step_counters(events))
        return online_gateway

    def _sweep(self, past: JournalledPast) -> None:
        """Remove unfinished uploads and what the journal needs no more; what it never named waits in the trash."""
        newest = max((event.at for events in past.experts.values() for event in events), default=0.0)
        swept = self._blobs.sweep(self._references(past, self._read or ()), self._clock(), newest)
        if swept.to_trash or swept.taken_back:
            _log.warning("unnamed_blobs", **asdict(swept))

    def references(self) -> BlobReferences:
        """The blobs that the journal needs now, and those it named before."""
        events = list(self._journal.events())
        return self._references(past_of(events), events)

    def _references(self, past: JournalledPast, journalled: Iterable[Event]) -> BlobReferences:
        versions = [event for events in past.experts.values() for event in events]
        others = (self._statistics.blobs(), published_blobs(self._journal))
        needed = past.quarantine.digests().union(*(named.needed for named in others))
        needed |= {digest for event in (*versions, *past.merges) if (digest := blob_of(event)) is not None}
        for name in past.experts:
            needed |= set(self._journal.snapshots(name).values())
        replaced = {digest for event in journalled if (digest := blob_of(event)) is not None}
        return BlobReferences(needed, replaced.union(*(named.replaced for named in others)))

    def _recover_expert(self, events: list[Event]) -> ExpertModel:
        registered, chains = registration(events), lineages(events)
        version = max(chains)
        newest, rule = chains[version], self._aggregation.rule
        stored = InitialWeights(registered.seed, rule) if newest is None else self._rebuild(registered, chains, newest)
        by = Registrant(registered.worker, registered.token)
        expert = ExpertModel(registered.expert, registered.manifest, version, stored, registrant=by)
        norms = (event.landed_norm for event in reversed(events) if isinstance(event, UpdateAccepted))
        usual = itertools.islice((norm for norm in norms if norm is not None), USUAL_WINDOW)
        return replace(expert, norms=tuple(usual)[::-1])

    def _recover_whole(self, events: list[Event]) -> ExpertModel:
        """The expert, checked against its journalled digest; unreadable updates are left out if that is allowed."""
        while True:
            try:
                expert = self._recover_expert(events)
                break
            except DamagedUpdateError as error:
                left_out = sum(isinstance(event, UpdateLost) for event in events)
                if not self._skip_damaged or left_out >= MOST_LEFT_OUT:
                    raise
                self._lost.append(error.left_out(max(lineages(events)) + 1, self._clock()))
                events.append(self._lost[-1])
        expected = self._journal.version_digest(expert.name, expert.version)
        if expected is not None and expert.digest != expected:
            raise StorageFailedError(
                f"version {expert.version} of {expert.name} was rebuilt with the digest {expert.digest}, journalled is "
                f"{expected}: what it is made of, or the program that rebuilds it, is not what it was. Restore the "
                "state directory from a backup, or run the version of FedMoE and numpy that wrote it."
            )
        return expert

    def _journal_lost(self, experts: Mapping[str, ExpertModel]) -> None:
        """Journal which updates the experts were rebuilt without, once all experts could be rebuilt."""
        newest = {(expert.name, expert.version): expert.digest for expert in experts.values() if expert.version}
        self._journal.append(self._lost, [newest.get((lost.expert, lost.version)) for lost in self._lost])
        for lost in self._lost:
            _log.error("update_lost", expert=lost.expert, made=lost.made, version=lost.version, digest=lost.digest)
        self._lost = []

    def at_version(self, expert: ExpertModel, version: int) -> RebuiltState:
        """The state the expert had at an earlier version."""
        erasures = self.erasures
        events, chains = self._past(expert)
        registered = registration(events)
        if version not in chains or version >= expert.version:
            raise RefusedError(
                "unknown_version",
                f"{expert.title} is at version {expert.version}; there is no earlier version {version}.",
                f"Choose a version from 0 to {expert.version - 1}.",
            )
        rebased = start(chains[expert.version])
        if rebased is not None and start(chains[version]) is not rebased:
            raise RefusedError(
                "folded",
                f"what {expert.title} was at version {version} is merged into the gateway, onto which it was rebased "
                f"as version {rebased.version}.",
                f"A merge cannot be undone for one expert; choose version {rebased.version} or a later one.",
            )
        updates = Lineage.updates(chains[version])
        staying = {update.identity for update in updates}
        removed = [update for update in Lineage.updates(chains[expert.version]) if update.identity not in staying]
        with self._refusing_pruned():
            state = self._rebuild(registered, chains, chains[version])
        return RebuiltState(state, len(removed), count_steps(events, updates), "", expert.version, erasures)

    def without_worker(self, expert: ExpertModel, worker: str) -> RebuiltState:
        """The state the expert would have had the worker contributed nothing to its newest version."""
        erasures = self.erasures
        events, chains = self._past(expert)
        chain = without_worker(chains[expert.version], worker)
        removed = length(chains[expert.version]) - length(chain)
        note = left_in_the_gateway(chains, self._merges(), expert.name, worker)
        if removed == 0:
            raise RefusedError(
                "nothing_to_retract",
                f"version {expert.version} of {expert.title} holds no update of worker {worker!r}.",
                note or "Check the worker's name with 'fedmoe experts'.",
            )
        with self._refusing_pruned():
            state = self._rebuild(registration(events), chains, chain)
        since = count_steps(events, Lineage.updates(chain))
        return RebuiltState(state, removed, since, note, expert.version, erasures)

    def caught_up(self, rebuilt: RebuiltState, expert: ExpertModel, worker: str | None) -> RebuiltState | None:
        """`rebuilt` brought up to the newer `expert`: without `worker`, or at an earlier version (None).

        None if more came since than updates. Where experts are rebased onto the gateway any change counts as more.
        """
        if rebuilt.erasures != self.erasures:
            return None
        if expert.version == rebuilt.version:
            return rebuilt
        since = self._journal.events(expert.name, after_version=rebuilt.version)
        newer = [event for event in since if made_version(event) <= expert.version]
        updates = [event for event in newer if isinstance(event, UpdateAccepted)]
        if self._aggregation.merge_after is not None or len(updates) < len(newer):
            return None
        landed = [] if worker is None else [update for update in updates if update.worker != worker]
        with self._refusing_pruned():
            state = self._land(rebuilt.state, landed, expert.manifest)
        removed = rebuilt.removed + len(updates) - len(landed)
        return replace(rebuilt, state=state, removed=removed, version=expert.version)

    @contextmanager
    def _refusing_pruned(self) -> Iterator[None]:
        """Updates whose bytes were removed on purpose are a refusal, not damage."""
        try:
            yield
        except DamagedUpdateError as error:
            fix = why_released(self._journal, error.update, self._keep_updates) if error.missing else None
            if fix is None:
                raise
            raise RefusedError(
                "history_pruned",
                f"the update that made version {error.update.version} of {error.update.expert} is no longer kept.",
                fix,
            ) from None

    def left_in_the_gateway(self, name: str, worker: str) -> str:
        """What of a worker's updates stays in the gateway, in words; empty where all can be taken out."""
        return left_in_the_gateway(lineages(self._journal.events(name)), self._merges(), name, worker)

    def snapshot_if_due(self, expert: ExpertModel, every: int = SNAPSHOT_EVERY) -> None:
        """Keep the expert's state every so many versions, so that recovery reads few updates; then prune."""
        if expert.version - max(self._journal.snapshots(expert.name), default=0) < every:
            return
        self.snapshot(expert)
        if self._keep_updates is not None:
            self._prune(expert, self._keep_updates)

    def snapshot(self, expert: ExpertModel) -> int:
        """Keep the expert's state, so that recovery needs nothing older; the version that it is."""
        self._journal.add_snapshot(expert.name, expert.version, put(self._blobs, snapshot_bytes(expert.state)))
        return expert.version

    def prune_gateways(self, online_gateway: OnlineGateway) -> None:
        """Delete gateways that no expert branches from any more, unless the whole past is kept."""
        if self._keep_updates is None:
            return
        branched_from = {branch_point.gateway for branch_point in online_gateway.branch_points.values()}
        needed, merges = branched_from | {online_gateway.number}, self._merges()
        digests = {merge.digest for merge in merges} - {merge.digest for merge in merges if merge.number in needed}
        self._delete_unneeded(GATEWAY, digests)

    def _prune(self, expert: ExpertModel, keep_updates: int) -> None:
        """Delete what undoing the last `keep_updates` changes does not need."""
        name = expert.name
        snapshots = self._journal.snapshots(name)
        oldest = max(0, expert.version - keep_updates)
        plan = prune_plan(list(self._journal.events(name)), snapshots, expert.version, oldest)
        for version in plan.snapshots:
            self._journal.drop_snapshot(name, version)
        digests = plan.updates | {snapshots[version] for version in plan.snapshots}
        digests -= {snapshots[version] for version in snapshots.keys() - plan.snapshots}
        self._delete_unneeded(name, digests)

    def _delete_unneeded(self, name: str, digests: Set[str]) -> None:
        """Delete what an expert, or the gateway, needs no more: equal bytes are one blob, whoever sent them."""
        self._blobs.delete(*(digests - self.quarantined_blobs() - self._journal.named_elsewhere(name, digests)))
