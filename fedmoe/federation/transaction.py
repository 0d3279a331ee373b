"""A transaction: changes of a federation being worked out, before they are journalled and published."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedmoe.experts import GATEWAY_SEED, ExpertModel, Registrant, check_manifest, expert_named, first_name, seed_of
from fedmoe.federation import expert_roll as roll
from fedmoe.federation.aggregation import Aggregation, ExpertMoments
from fedmoe.federation.events import (
    Event,
    ExpertRebased,
    ExpertRegistered,
    ExpertRenamed,
    ExpertRetired,
    ExpertRolledBack,
    ExpertUnretired,
    GatewayMerged,
    HeldUpdateRejected,
    QuarantineEvent,
    RollEvent,
    UpdateAccepted,
    UpdateHeld,
    UpdateLost,
    WorkerRetracted,
)
from fedmoe.federation.online_gateway import CountedUpdate, OnlineGateway
from fedmoe.federation.quarantine import Quarantine
from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.update_rules import RuleState, clip_factor, times_usual
from fedmoe.runtime.errors import RefusedError


@dataclass(frozen=True, slots=True)
class Submission:
    """An update as it arrives: who sent it, as which of their updates, from which version it was made, its L2 norm."""

    expert: str
    worker: str
    epoch: str
    sequence: int
    base_version: int
    digest: str
    info: dict[str, float] = field(default_factory=dict)
    norm: float | None = None


@dataclass(frozen=True, slots=True)
class Savepoint:
    """A point in a transaction to go back to."""

    experts: dict[str, ExpertModel]
    manifest: Manifest | None
    gateway_version: int
    events: int
    moments: dict[str, ExpertMoments]
    online_gateway: OnlineGateway | None
    quarantine: Quarantine
    roll_changes: int


@dataclass
class Transaction:
    """Changes under way: sees what is published plus what it has decided so far."""

    aggregation: Aggregation
    experts: dict[str, ExpertModel]
    manifest: Manifest | None
    gateway_version: int
    events: list[Event] = field(default_factory=list)
    moments: dict[str, ExpertMoments] = field(default_factory=dict)
    online_gateway: OnlineGateway | None = None
    #: Renames, retirements and returns so far.
    roll_changes: int = 0
    #: The content hash of the weights that each of `events` leaves behind, see `_digest_after`.
    version_digests: list[str | None] = field(default_factory=list)
    quarantine: Quarantine = field(default_factory=Quarantine)

    def savepoint(self) -> Savepoint:
        """The point reached so far."""
        experts, moments, events = dict(self.experts), dict(self.moments), len(self.events)
        named = (experts, self.manifest, self.gateway_version, events, moments, self.online_gateway)
        return Savepoint(*named, self.quarantine, self.roll_changes)

    def rollback_to(self, savepoint: Savepoint) -> None:
        """Forget everything since `savepoint`."""
        self.experts, self.manifest, self.gateway_version = (
            dict(savepoint.experts),
            savepoint.manifest,
            savepoint.gateway_version,
        )
        del self.events[savepoint.events :]
        del self.version_digests[savepoint.events :]
        self.moments, self.online_gateway, self.quarantine = (
            dict(savepoint.moments),
            savepoint.online_gateway,
            savepoint.quarantine,
        )
        self.roll_changes = savepoint.roll_changes

    def expert(self, name: str) -> ExpertModel:
        """The expert, or a refusal that lists which there are."""
        return expert_named(self.experts, name)

    def register(
        self, name: str, worker: str, manifest: Manifest, seed: int | None, at: float, token: str = ""
    ) -> ExpertModel:
        """The expert of this name, made now if it is new; a manifest unlike the federation's is refused."""
        known = self.experts.get(first_name(self.experts, name))
        if known is not None:
            known.require_active()
        if self.manifest is not None:
            check_manifest(self.manifest, manifest)
        if known is not None:
            return known
        if self.aggregation.merge_after is not None:
            self._register_from_gateway(name, worker, manifest, seed, at, token)
        else:
            chosen = seed if seed is not None else seed_of(name)
            self.apply(ExpertRegistered(name, worker, manifest, chosen, at, token))
        return self.experts[name]

    def _register_from_gateway(
        self, name: str, worker: str, manifest: Manifest, seed: int | None, at: float, token: str
    ) -> None:
        if seed is not None:
            raise RefusedError(
                "start_mismatch",
                f"experts of this federation start from its gateway; got a seed for the first weights of {name}.",
                "Register it without a seed.",
            )
        self.apply(ExpertRegistered(name, worker, manifest, GATEWAY_SEED, at, token))
        assert self.online_gateway is not None, "there is a gateway once there is a manifest"
        if self.online_gateway.last is not None:
            start = self.aggregation.rule.init(self.online_gateway.adapter.flat)
            event = ExpertRebased(name, self.online_gateway.number, self.online_gateway.last.digest, 0, 1, at)
            self.apply(event, rebuilt=start)

    def learn_moments(self, name: str, moments: ExpertMoments | None) -> None:
        """New moments of an expert's inputs; None where the gateway is made without, and its version rises the same."""
        if moments is not None:
            self.moments[name] = moments
        self.gateway_version += 1

    def rename(self, name: str, to: str, at: float) -> ExpertModel:
        """Give an expert another name, by which it goes from now on; its former ones still mean it."""
        return self._enrolled(*roll.rename(self.experts, name, to, self.roll_changes + 1, at))

    def retire(self, name: str, reason: str, at: float) -> ExpertModel:
        """Let an expert rest: it takes no updates, is no part of the gateway, and stays what it is."""
        return self._enrolled(*roll.retire(self.experts, name, reason, self.roll_changes + 1, at))

    def unretire(self, name: str, at: float) -> ExpertModel:
        """Bring a retired expert back as it was."""
        return self._enrolled(*roll.unretire(self.experts, self.manifest, name, self.roll_changes + 1, at))

    def _enrolled(self, expert: ExpertModel, event: RollEvent | None) -> ExpertModel:
        if event is not None:
            self.apply(event)
        return self.experts[expert.name]

    def _apply_to_roll(self, event: RollEvent) -> None:
        self.experts[event.expert] = roll.changed(self.experts[event.expert], event)
        self.roll_changes += 1
        manifest = roll.binding_manifest(self.experts)
        if manifest is None or self.manifest is None:
            self.manifest = manifest
            self.online_gateway = self.aggregation.first_gateway(manifest) if manifest is not None else None

    def admit(self, submission: Submission, at: float) -> UpdateAccepted:
        """What accepting this update would mean; refuses future and too stale base versions."""
        expert = self.expert(submission.expert)
        expert.require_active()
        staleness = expert.staleness(submission.base_version)
        limit = self.aggregation.max_staleness
        if limit is not None and staleness > limit:
            raise RefusedError(
                "too_stale",
                f"the update is {staleness} versions behind {expert.title} version {expert.version}; "
                f"at most {limit} are accepted.",
                "Pull the newest version, rebase the local weights onto it and push again.",
                newest_version=expert.version,
                staleness=staleness,
            )
        clip, info = self._clip(expert, submission.norm), submission.info
        if submission.norm is not None:
            info = info | {"norm": submission.norm} | ({"clip": clip} if clip < 1 else {})
            info |= {"low": 1.0} if self._is_low(expert, submission.norm) else {}
        return UpdateAccepted(
            expert.name,
            submission.worker,
            submission.epoch,
            submission.sequence,
            submission.base_version,
            submission.digest,
            staleness,
            clip * self.aggregation.coefficient(staleness),
            expert.version + 1,
            at,
            info,
        )

    def _clip(self, expert: ExpertModel, norm: float | None) -> float:
        if self.aggregation.clip_norm is None or norm is None:
            return 1.0
        return clip_factor(norm, expert.norms, self.aggregation.clip_norm)

    def _is_low(self, expert: ExpertModel, norm: float) -> bool:
        """Whether the norm is so far below the usual that it must not become usual: then all others would be held."""
        times, most = times_usual(norm, expert.norms), self.aggregation.hold_norm
        return times is not None and most > 0 and times < 1 / most

    def hold(self, update: UpdateAccepted, size: int, token: str, suspicion: str = "") -> UpdateHeld | None:
        """The update as it waits for an administrator; None if it may land as it is.

        It waits if it would land with more than `hold_norm` times the usual norm, or for another `suspicion`. Raises
        RefusedError if too many wait already.
        """
        reason = suspicion or self._unusual(update)
        if not reason:
            return None
        held = UpdateHeld(
            self.quarantine.number + 1,
            update.expert,
            update.worker,
            update.epoch,
            update.sequence,
            update.base_version,
            update.digest,
            size,
            self.expert(update.expert).version,
            update.staleness,
            reason,
            token,
            update.at,
            update.info,
        )
        self.quarantine.check_room(held)
        return held

    def _unusual(self, update: UpdateAccepted) -> str:
        """Why the update's norm is unusual, in words; empty if it is not."""
        norm, most = update.info.get("norm", 0.0) * update.info.get("clip", 1.0), self.aggregation.hold_norm
        times = times_usual(norm, self.expert(update.expert).norms)
        if times is None or most <= 0 or times <= most:
            return ""
        return f"its norm {norm:.4g} is {times:.4g} times the usual one of {update.expert}; held above {most:g} times"

    def reject(self, number: int, reason: str, at: float) -> HeldUpdateRejected:
        """The held update of this number will never land."""
        held = self.quarantine.numbered(number)
        named = (held.expert, held.worker, held.epoch, held.sequence, held.digest)
        event = HeldUpdateRejected(self.quarantine.number + 1, number, *named, reason, at)
        self.apply(event)
        return event

    def roll_back(
        self,
        name: str,
        to_version: int,
        state: RuleState,
        reason: str,
        at: float,
        since: tuple[CountedUpdate, ...] = (),
    ) -> ExpertRolledBack:
        """The expert's next version gets `state`, rebuilt by the caller from version `to_version`; see `apply`."""
        expert = self.expert(name)
        event = ExpertRolledBack(expert.name, to_version, expert.version + 1, reason, at)
        self.apply(event, rebuilt=state, since=since)
        return event

    def retract(
        self,
        name: str,
        worker: str,
        removed: int,
        state: RuleState,
        reason: str,
        at: float,
        since: tuple[CountedUpdate, ...] = (),
    ) -> WorkerRetracted:
        """The expert's next version gets `state`, rebuilt by the caller without the worker's updates; see `apply`."""
        expert = self.expert(name)
        event = WorkerRetracted(expert.name, worker, removed, expert.version + 1, reason, at)
        self.apply(event, rebuilt=state, since=since)
        return event

    def apply(
        self,
        event: Event,
        delta: FloatVector | None = None,
        rebuilt: RuleState | None = None,
        gateway: Adapter | None = None,
        since: tuple[CountedUpdate, ...] = (),
    ) -> None:
        """Apply one event: an update needs its delta, a fold the new gateway, any other change the rebuilt state.

        `since` is what an expert with a rebuilt state is made of from where it left the gateway, if experts do.
        """
        if isinstance(event, QuarantineEvent):
            self._note(event)
            return
        rule = self.aggregation.rule
        match event:
            case ExpertRegistered():
                if self.manifest is None:
                    self.manifest, self.online_gateway = event.manifest, self.aggregation.first_gateway(event.manifest)
                expert = ExpertModel.initial(event.expert, self.manifest.shared_by(event.manifest), event.seed, rule)
                self.experts[event.expert] = replace(expert, registrant=Registrant(event.worker, event.token))
            case UpdateAccepted():
                assert delta is not None, "an accepted update is applied with its delta"
                landed = self.experts[event.expert].land(delta, event.coefficient, rule)
                self.experts[event.expert] = landed.with_norm(event.landed_norm)
            case ExpertRolledBack() | WorkerRetracted() | UpdateLost() | ExpertRebased():
                assert rebuilt is not None, "such a change is applied with the rebuilt state"
                self.experts[event.expert] = self.experts[event.expert].with_state(rebuilt)
            case ExpertRenamed() | ExpertRetired() | ExpertUnretired():
                self._apply_to_roll(event)
            case GatewayMerged():
                pass
        if self.online_gateway is not None:
            self.online_gateway = self.online_gateway.after(event, gateway, since)
        self.gateway_version += 1
        self._note(event)

    def _note(self, event: Event) -> None:
        self.quarantine = self.quarantine.after(event)
        self.events.append(event)
        self.version_digests.append(self._digest_after(event))

    def _digest_after(self, event: Event) -> str | None:
        """The content hash of the version that an event made; None where it made none, or an expert's first one."""
        match event:
            case UpdateAccepted() | ExpertRolledBack() | WorkerRetracted() | UpdateLost() | ExpertRebased():
                return self.experts[event.expert].digest
            case GatewayMerged():
                return self.online_gateway.digest if self.online_gateway is not None else None
            case _:
                return None
