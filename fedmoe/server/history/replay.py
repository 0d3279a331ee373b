"""Replay: states of experts rebuilt from journal and blobs, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import structlog

from fedmoe.coordinator import Aggregation
from fedmoe.experts import ExpertModel
from fedmoe.federation.events import (
    Event,
    ExpertRebased,
    ExpertRegistered,
    GatewayMerged,
    UpdateAccepted,
)
from fedmoe.federation.lineage import Lineage, length, start
from fedmoe.federation.online_gateway import BranchPoint
from fedmoe.federation.transitions import lineages
from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.codec import decode
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.update_rules import RuleState
from fedmoe.server.history.damage import DamagedUpdateError, with_progress
from fedmoe.server.history.event_queries import made_version, registration
from fedmoe.server.history.snapshots import best_snapshot, read_snapshot
from fedmoe.server.storage.blobs import (
    BlobStore,
    CorruptBlobError,
    MissingBlobError,
)
from fedmoe.server.storage.event_rows import GATEWAY
from fedmoe.server.storage.journal import Journal

_log = structlog.get_logger("fedmoe.history")


class Replay:
    """Rebuilds states of experts from their events."""

    def __init__(self, journal: Journal, blobs: BlobStore, aggregation: Aggregation) -> None:
        self._journal = journal
        self._blobs = blobs
        self._aggregation = aggregation

    def rebased_state(self, weights: FloatVector, updates: list[UpdateAccepted], manifest: Manifest) -> RuleState:
        """The state of an expert rebased onto a gateway: these updates on its weights, with a new server optimizer."""
        return self._land(self._aggregation.rule.init(weights), updates, manifest)

    def branch_weights(self, expert: ExpertModel, branch_point: BranchPoint) -> Adapter:
        """The weights the expert branched from: the gateway's, or its first ones."""
        if branch_point.left is not None:
            weights = self._gateway_weights(branch_point.left.digest, expert.manifest)
        else:
            weights = self._beginning(registration(self._journal.events(expert.name)), None).weights
        return Adapter(expert.manifest.layout, expert.manifest.alpha, weights)

    def _gateway_weights(self, digest: str, manifest: Manifest) -> FloatVector:
        return decode(self._blobs.read(digest), manifest.layout).flat

    def _merges(self) -> list[GatewayMerged]:
        return [event for event in self._journal.events(GATEWAY) if isinstance(event, GatewayMerged)]

    def _past(self, expert: ExpertModel) -> tuple[list[Event], dict[int, Lineage | None]]:
        events = [event for event in self._journal.events(expert.name) if made_version(event) <= expert.version]
        return events, lineages(events)

    def _rebuild(
        self, registered: ExpertRegistered, chains: Mapping[int, Lineage | None], chain: Lineage | None
    ) -> RuleState:
        """The state after the updates `chain`, from the newest readable snapshot of a beginning of them, if any."""
        snapshots = self._journal.snapshots(registered.expert)
        while beginning := best_snapshot(snapshots, chains, chain):
            digest = snapshots.pop(beginning.version)
            try:
                body = self._blobs.read(digest)
            except (MissingBlobError, CorruptBlobError) as error:
                # A snapshot only saves time: what it holds is replayed from an older one.
                _log.error("snapshot_lost", expert=registered.expert, version=beginning.version, reason=str(error))
                continue
            state = read_snapshot(body, length(chains[beginning.version]))
            return self._land(state, beginning.rest, registered.manifest)
        state = self._beginning(registered, start(chain))
        return self._land(state, Lineage.updates(chain), registered.manifest)

    def _beginning(self, registered: ExpertRegistered, left: ExpertRebased | None) -> RuleState:
        """The state before any update: the gateway that the expert was rebased onto, or its first weights."""
        rule = self._aggregation.rule
        if left is not None:
            return rule.init(self._gateway_weights(left.digest, registered.manifest))
        return ExpertModel.initial(registered.expert, registered.manifest, registered.seed, rule).state

    def _land(self, state: RuleState, updates: list[UpdateAccepted], manifest: Manifest) -> RuleState:
        for update in with_progress(updates):
            try:
                body = self._blobs.read(update.digest)
            except (MissingBlobError, CorruptBlobError) as error:
                raise DamagedUpdateError(update, str(error), isinstance(error, MissingBlobError)) from error
            state = self._aggregation.rule.update(state, decode(body, manifest.layout).flat, update.coefficient)
        return state
