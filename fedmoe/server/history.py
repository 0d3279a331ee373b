"""History: recovery after a crash, snapshots, rollback and retraction, all by replay of the journal.

Folding the same updates in the same order gives the same bits, so a snapshot plus the updates after it equals a replay
from the start, and an expert without one worker is the replay without that worker's updates.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fedmoe.coordinator import Aggregation, CentralCoordinator, Draft
from fedmoe.errors import RefusedError
from fedmoe.events import Event, ExpertRegistered, Lineage, UpdateAccepted, lineages, without_worker
from fedmoe.experts import ExpertModel
from fedmoe.lora.codec import decode
from fedmoe.lora.container import encode_named, read_named
from fedmoe.lora.update_rules import RuleState
from fedmoe.manifest import Manifest
from fedmoe.storage.blobs import BlobStore, MissingBlobError, put
from fedmoe.storage.journal import Journal

SNAPSHOT_EVERY = 50


def snapshot_bytes(state: RuleState) -> bytes:
    """An expert's state as safetensors; `read_snapshot` gives it back bit for bit."""
    tensors = {"weights": state.weights} | {f"moment.{i}": moment for i, moment in enumerate(state.moments)}
    return encode_named(tensors, {"count": str(state.count)})


def read_snapshot(data: bytes, count: int) -> RuleState:
    """The state that `snapshot_bytes` wrote; `count` is how many updates it holds."""
    tensors = read_named(data)
    moments = tuple(tensors[f"moment.{i}"] for i in range(len(tensors) - 1))
    return RuleState(tensors["weights"], moments, count)


@dataclass(frozen=True)
class Rebuilt:
    """A state rebuilt from the journal, and how many updates of the newest version it lacks."""

    state: RuleState
    removed: int


class History:
    """Reads and writes the past of all experts in a journal and its blobs."""

    def __init__(
        self, journal: Journal, blobs: BlobStore, aggregation: Aggregation, keep_updates: int | None = None
    ) -> None:
        self._journal = journal
        self._blobs = blobs
        self._aggregation = aggregation
        self._keep_updates = keep_updates

    def recover(self) -> CentralCoordinator:
        """The coordinator as it was when the last acknowledged event was written."""
        self._check_rule()
        events = list(self._journal.events())
        self._sweep(events)
        experts = {}
        for event in events:
            if isinstance(event, ExpertRegistered):
                experts[event.expert] = self._recover_expert(event, [e for e in events if e.expert == event.expert])
        coordinator = CentralCoordinator(self._aggregation)
        manifest = next(iter(experts.values())).manifest if experts else None
        coordinator.publish(Draft(self._aggregation, experts, manifest, len(events)))
        return coordinator

    def _check_rule(self) -> None:
        """An expert's past was folded with one rule; another rule would rebuild other weights."""
        chosen, kept = self._aggregation.server_optimizer, self._journal.meta("server_optimizer")
        if kept is None:
            self._journal.set_meta("server_optimizer", chosen)
        elif kept != chosen:
            raise RefusedError(
                "rule_mismatch",
                f"this state directory was made with server optimizer {kept!r}, started with {chosen!r}.",
                f"Start with --server-optimizer {kept}, or choose another --state-dir.",
            )

    def _sweep(self, events: Iterable[Event]) -> None:
        """Remove what a crash left half done: unfinished uploads, blobs that never reached the journal."""
        referenced = {event.digest for event in events if isinstance(event, UpdateAccepted)}
        for event in events:
            if isinstance(event, ExpertRegistered):
                referenced |= set(self._journal.snapshots(event.expert).values())
        self._blobs.sweep(referenced)

    def _recover_expert(self, registered: ExpertRegistered, events: list[Event]) -> ExpertModel:
        chains = lineages(events)
        version = max(chains)
        state = self._rebuild(registered.expert, registered.manifest, registered.seed, chains, chains[version])
        return ExpertModel(registered.expert, registered.manifest, version, state)

    def at_version(self, expert: ExpertModel, version: int) -> Rebuilt:
        """The state the expert had at an earlier version."""
        registered, chains = self._past(expert)
        if version not in chains or version >= expert.version:
            raise RefusedError(
                "unknown_version",
                f"{expert.name} is at version {expert.version}; there is no earlier version {version}.",
                f"Choose a version from 0 to {expert.version - 1}.",
            )
        state = self._rebuild(expert.name, expert.manifest, registered.seed, chains, chains[version])
        return Rebuilt(state, _length(chains[expert.version]) - _length(chains[version]))

    def without_worker(self, expert: ExpertModel, worker: str) -> Rebuilt:
        """The state the expert would have had the worker contributed nothing to its newest version."""
        registered, chains = self._past(expert)
        chain = without_worker(chains[expert.version], worker)
        removed = _length(chains[expert.version]) - _length(chain)
        if removed == 0:
            raise RefusedError(
                "nothing_to_retract",
                f"version {expert.version} of {expert.name} holds no update of worker {worker!r}.",
                "Check the worker's name with 'fedmoe experts'.",
            )
        state = self._rebuild(expert.name, expert.manifest, registered.seed, chains, chain)
        return Rebuilt(state, removed)

    def _past(self, expert: ExpertModel) -> tuple[ExpertRegistered, dict[int, Lineage | None]]:
        events = list(self._journal.events(expert.name))
        registered = events[0]
        assert isinstance(registered, ExpertRegistered), "an expert's first event is its registration"
        return registered, lineages(events)

    def _rebuild(
        self,
        name: str,
        manifest: Manifest,
        seed: int,
        chains: dict[int, Lineage | None],
        wanted: Lineage | None,
    ) -> RuleState:
        """Fold `wanted` from the newest snapshot that is a beginning of it, or from version 0."""
        rule = self._aggregation.rule
        for version, digest in sorted(self._journal.snapshots(name).items(), reverse=True):
            rest = Lineage.updates(wanted, after=chains[version]) if chains[version] is not None else None
            if rest is not None:
                start = read_snapshot(self._blobs.read(digest), _length(chains[version]))
                return self._fold(start, rest, manifest)
        start = ExpertModel.initial(name, manifest, seed, rule).state
        return self._fold(start, Lineage.updates(wanted) or [], manifest)

    def _fold(self, state: RuleState, updates: list[UpdateAccepted], manifest: Manifest) -> RuleState:
        for update in updates:
            try:
                body = self._blobs.read(update.digest)
            except MissingBlobError:
                if self._keep_updates is None:
                    raise
                raise RefusedError(
                    "history_pruned",
                    f"the update that made version {update.version} of {update.expert} is no longer kept.",
                    f"Only the last {self._keep_updates} updates can be undone (--keep-updates).",
                ) from None
            state = self._aggregation.rule.update(state, decode(body, manifest.layout).flat, update.coefficient)
        return state

    def snapshot_if_due(self, expert: ExpertModel, every: int = SNAPSHOT_EVERY) -> None:
        """Keep the expert's state every so many versions, so that recovery reads few updates; then prune."""
        kept = self._journal.snapshots(expert.name)
        if expert.version - max(kept, default=0) < every:
            return
        self._journal.add_snapshot(expert.name, expert.version, put(self._blobs, snapshot_bytes(expert.state)))
        if self._keep_updates is not None:
            self._prune(expert, self._keep_updates)

    def _prune(self, expert: ExpertModel, keep_updates: int) -> None:
        """Drop the bytes of updates that the oldest snapshot still needed already contains."""
        kept = self._journal.snapshots(expert.name)
        horizon = max((version for version in kept if version <= expert.version - keep_updates), default=0)
        if horizon == 0:
            return
        updates = [event for event in self._journal.events(expert.name) if isinstance(event, UpdateAccepted)]
        needed = {update.digest for update in updates if update.version > horizon}
        for update in updates:
            if update.version <= horizon and update.digest not in needed:
                self._blobs.delete(update.digest)
        for version in kept:
            if version < horizon:
                self._blobs.delete(kept[version])
                self._journal.drop_snapshot(expert.name, version)


def _length(chain: Lineage | None) -> int:
    return chain.length if chain is not None else 0
