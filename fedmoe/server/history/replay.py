"""Replay: states of experts rebuilt from journal, blobs and snapshots, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import structlog

from fedmoe.coordinator import Aggregation
from fedmoe.experts import ExpertModel
from fedmoe.federation.events import (
    Event,
    ExpertRebased,
    ExpertRegistered,
    GatewayMerged,
    QuarantineEvent,
    RollEvent,
    UpdateAccepted,
    UpdateLost,
    VersionEvent,
)
from fedmoe.federation.lineage import Chains, Lineage, length, start
from fedmoe.federation.online_gateway import BranchPoint
from fedmoe.federation.quarantine import Quarantine
from fedmoe.federation.transitions import lineages
from fedmoe.lora.adapter import Adapter, FloatVector, Layout
from fedmoe.lora.codec import decode
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.safetensors_bytes import encode_named, read_named
from fedmoe.lora.update_rules import RuleState
from fedmoe.server.storage.blob_copies import in_threads
from fedmoe.server.storage.blobs import BlobStore, CorruptBlobError, MissingBlobError
from fedmoe.server.storage.event_rows import GATEWAY
from fedmoe.server.storage.journal import Journal

_log = structlog.get_logger("fedmoe.history")
#: Updates of an expert that may be left out. Where more are missing a snapshot is lost and the bytes before it were let
#: go of: what could be made of the rest is not the expert.
MOST_LEFT_OUT = 16
_TELL_SECONDS = 5.0


class DamagedUpdateError(CorruptBlobError):
    """The bytes of an update that is needed are missing or not those that were stored; `missing` says which."""

    def __init__(self, update: UpdateAccepted, reason: str, missing: bool) -> None:
        made = f"version {update.version} of {update.expert}"
        super().__init__(
            f"the update that made {made} cannot be read: {reason}. Put the file back from a backup. To go on "
            f"without this update, start once with --skip-damaged: {update.expert} gets one more version, made of all "
            f"its other updates, and those from version {update.version} on cannot be rolled back to."
        )
        self.update = update
        self.missing = missing

    def left_out(self, version: int, at: float) -> UpdateLost:
        """The event that leaves the update out as the expert's next version."""
        lost = self.update
        return UpdateLost(
            lost.expert, lost.worker, lost.epoch, lost.sequence, lost.digest, lost.version, version, str(self), at
        )


@dataclass(frozen=True, slots=True)
class JournalledPast:
    """A journal's events by what they change: `experts` are those of each expert in order, by its first name."""

    experts: dict[str, list[Event]]
    merges: list[GatewayMerged]
    roll: list[RollEvent]
    quarantine: Quarantine


def past_of(events: Iterable[Event]) -> JournalledPast:
    """Sort a journal's events; experts with equal layouts share one."""
    past = JournalledPast({}, [], [], Quarantine())
    quarantine = past.quarantine
    layouts: dict[Layout, Manifest] = {}
    for event in events:
        if quarantine.held or isinstance(event, QuarantineEvent):
            quarantine = quarantine.after(event)
        if isinstance(event, GatewayMerged):
            past.merges.append(event)
        elif isinstance(event, RollEvent):
            past.roll.append(event)
        elif isinstance(event, ExpertRegistered):
            shared = layouts.setdefault(event.manifest.layout, event.manifest)
            past.experts[event.expert] = [replace(event, manifest=shared.shared_by(event.manifest))]
        elif isinstance(event, VersionEvent):
            past.experts[event.expert].append(event)
    return replace(past, quarantine=quarantine)


def made_version(event: Event) -> int:
    """The version that an event of an expert made."""
    return event.version if isinstance(event, VersionEvent) else 0


def registration(events: Iterable[Event]) -> ExpertRegistered:
    """An expert's first event."""
    registered = next(iter(events))
    assert isinstance(registered, ExpertRegistered), "an expert's first event is its registration"
    return registered


def left_in_the_gateway(chains: Chains, merges: Iterable[GatewayMerged], expert: str, worker: str) -> str:
    """What of a worker's updates cannot be taken out of ONE expert, in words; nothing where all can.

    It is what the expert held when it was merged into the gateway, by its newest version in `chains` or before.
    """
    rebased, newest = start(chains[max(chains)]), max(chains)
    versions = (merge.sources[expert] for merge in merges if merge.sources.get(expert, newest) < newest)
    merged = any(update.worker == worker for version in versions for update in Lineage.updates(chains[version]))
    if rebased is None or not merged:
        return ""
    return f"What {worker!r} gave before the expert was rebased as version {rebased.version} stays in the gateway."


def snapshot_bytes(state: RuleState) -> bytes:
    """An expert's state as safetensors; `read_snapshot` gives it back bit for bit."""
    tensors = {"weights": state.weights} | {f"moment.{i}": moment for i, moment in enumerate(state.moments)}
    return encode_named(tensors, {"count": str(state.count)})


def read_snapshot(data: bytes, count: int) -> RuleState:
    """The state that `snapshot_bytes` wrote; `count` is how many updates it holds."""
    tensors = read_named(data)
    moments = tuple(tensors[f"moment.{i}"] for i in range(len(tensors) - 1))
    return RuleState(tensors["weights"], moments, count)


@dataclass(frozen=True, slots=True)
class ReplayStart:
    """A snapshot to start from, and the updates that follow it."""

    version: int
    rest: list[UpdateAccepted]


def best_snapshot(snapshots: Mapping[int, str], chains: Chains, chain: Lineage | None) -> ReplayStart | None:
    """The longest beginning of `chain` that a snapshot holds."""
    snapshot_of = {id(chains[version]): version for version in snapshots if version in chains}
    rest: list[UpdateAccepted] = []
    while chain is not None:
        if id(chain) in snapshot_of:
            return ReplayStart(snapshot_of[id(chain)], rest[::-1])
        if chain.update is None:
            return None
        rest.append(chain.update)
        chain = chain.before
    return None


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
        if branch_point.rebased is not None:
            weights = self._gateway_weights(branch_point.rebased.digest, expert.manifest)
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

    def _rebuild(self, registered: ExpertRegistered, chains: Chains, chain: Lineage | None) -> RuleState:
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

    def _beginning(self, registered: ExpertRegistered, rebased: ExpertRebased | None) -> RuleState:
        """The state before any update: the gateway that the expert was rebased onto, or its first weights."""
        rule = self._aggregation.rule
        if rebased is not None:
            return rule.init(self._gateway_weights(rebased.digest, registered.manifest))
        return ExpertModel.initial(registered.expert, registered.manifest, registered.seed, rule).state

    def _land(self, state: RuleState, updates: list[UpdateAccepted], manifest: Manifest) -> RuleState:
        # A few reads at once: an object store takes 20 ms each, and up to 50 updates follow the newest snapshot.
        bodies = in_threads(self._update_bytes, [update.digest for update in updates])
        for update, body in zip(with_progress(updates), bodies, strict=True):
            if isinstance(body, Exception):
                raise DamagedUpdateError(update, str(body), isinstance(body, MissingBlobError)) from body
            state = self._aggregation.rule.update(state, decode(body, manifest.layout).flat, update.coefficient)
        return state

    def _update_bytes(self, digest: str) -> bytes | MissingBlobError | CorruptBlobError:
        try:
            return self._blobs.read(digest)
        except (MissingBlobError, CorruptBlobError) as error:
            return error


def with_progress(updates: Sequence[UpdateAccepted]) -> Iterator[UpdateAccepted]:
    """The same updates; says every few seconds how far whoever lands them has come, and how long it will take."""
    began = logged_at = time.monotonic()
    for done, update in enumerate(updates):
        now = time.monotonic()
        if now - logged_at >= _TELL_SECONDS:
            logged_at = now
            seconds_left = round((now - began) / done * (len(updates) - done), 1)
            _log.info("replaying", expert=update.expert, updates=done, of=len(updates), seconds_left=seconds_left)
        yield update
