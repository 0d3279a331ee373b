"""Transactions: uncommitted changes of a federation, which are then journalled and published."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from fedmoe.experts import GATEWAY_SEED, ExpertModel, check_manifest, expert_named, first_name, seed_of
from fedmoe.federation.aggregation import Aggregation, ExpertMoments
from fedmoe.federation.events import (
    CountedUpdate,
    Event,
    EventInputs,
    ExpertRebased,
    ExpertRegistered,
    ExpertRenamed,
    ExpertRetired,
    ExpertUnretired,
    GatewayMerged,
    HeldUpdateRejected,
    QuarantineEvent,
    RollEvent,
    UpdateAccepted,
    UpdateHeld,
    VersionEvent,
)
from fedmoe.federation.online_gateway import OnlineGateway
from fedmoe.federation.quarantine import Quarantine
from fedmoe.federation.transitions import TRANSITIONS, binding_manifest
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


@dataclass
class Transaction:
    """Uncommitted changes: sees what is published plus what it has decided so far."""

    aggregation: Aggregation
    experts: dict[str, ExpertModel]
    manifest: Manifest | None
    gateway_version: int
    events: list[Event] = field(default_factory=list)
    moments: dict[str, ExpertMoments] = field(default_factory=dict)
    online_gateway: OnlineGateway | None = None
    #: Renames, retirements and returns so far.
    roll_changes: int = 0
    #: The content hash of the weights that each of `events` made; None where it made none, or an expert's first ones.
    version_digests: list[str | None] = field(default_factory=list)
    quarantine: Quarantine = field(default_factory=Quarantine)

    def savepoint(self) -> Transaction:
        """A copy of the state reached so far, to go back to."""
        return replace(
            self,
            experts=dict(self.experts),
            events=list(self.events),
            moments=dict(self.moments),
            version_digests=list(self.version_digests),
        )

    def rollback_to(self, savepoint: Transaction) -> None:
        """Forget everything since `savepoint`."""
        vars(self).update(vars(savepoint.savepoint()))

    def expert(self, name: str) -> ExpertModel:
        """The expert, or a refusal that lists which there are."""
        return expert_named(self.experts, name)

    def register(
        self, name: str, worker: str, manifest: Manifest, seed: int | None, at: float, token: str = ""
    ) -> ExpertModel:
        """The expert of this name, made now if it is new; a manifest unlike the federation's is refused."""
        expert = self.experts.get(first_name(self.experts, name))
        if expert is not None:
            expert.require_active()
        if self.manifest is not None:
            check_manifest(self.manifest, manifest)
            manifest = self.manifest.shared_by(manifest)
        if expert is not None:
            return expert
        if self.aggregation.merge_after is not None:
            self._register_from_gateway(name, worker, manifest, seed, at, token)
        else:
            self.apply(ExpertRegistered(name, worker, manifest, seed_of(name) if seed is None else seed, at, token))
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
            event = ExpertRebased(name, self.online_gateway.number, self.online_gateway.last.digest, 0, 1, at)
            self.apply(event, rebuilt=self.aggregation.rule.init(self.online_gateway.adapter.flat))

    def learn_moments(self, name: str, moments: ExpertMoments | None) -> None:
        """Take new input moments of an expert, None where the gateway is made without; its version rises the same."""
        if moments is not None:
            self.moments[name] = moments
        self.gateway_version += 1

    def rename(self, name: str, to: str, at: float) -> ExpertModel:
        """Give an expert another name, by which it goes from now on; its former ones still mean it."""
        expert, holder = self.expert(name), self.experts.get(first_name(self.experts, to))
        if holder is not None and holder.name != expert.name:
            now = "" if holder.title == to else f" (now {holder.title})"
            raise RefusedError(
                "name_taken",
                f"{to!r} is or was the name of another expert{now}; names are never given to a second one.",
                "Choose another name.",
            )
        if expert.title != to:
            self.apply(ExpertRenamed(expert.name, to, self.roll_changes + 1, at))
        return self.experts[expert.name]

    def retire(self, name: str, reason: str, at: float) -> ExpertModel:
        """Retire an expert: it takes no updates, is no part of the gateway, and stays what it is."""
        expert = self.expert(name)
        if not expert.retired:
            self.apply(ExpertRetired(expert.name, self.roll_changes + 1, reason, at))
        return self.experts[expert.name]

    def unretire(self, name: str, at: float) -> ExpertModel:
        """Bring a retired expert back as it was; refused if the federation has another manifest now."""
        expert = self.expert(name)
        if self.manifest is not None:
            check_manifest(self.manifest, expert.manifest)
        if expert.retired:
            self.apply(ExpertUnretired(expert.name, self.roll_changes + 1, at))
        return self.experts[expert.name]

    def land(
        self,
        submission: Submission,
        delta: FloatVector | None,
        at: float,
        *,
        size: int = 0,
        token: str = "",
        suspicion: str = "",
        released: bool = False,
    ) -> UpdateAccepted | UpdateHeld:
        """Land an update, or hold it for an administrator unless one has `released` it; see `admit` and `hold`.

        `delta` may be missing where a `suspicion` says why it is held without being read.
        """
        update = self.admit(submission, at)
        held = None if released else self.hold(update, size, token, suspicion)
        if held is not None:
            self.apply(held)
            return held
        self.apply(update, delta)
        return update

    def admit(self, submission: Submission, at: float) -> UpdateAccepted:
        """The event that accepts this update; refuses future and too stale base versions."""
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
        clip, info = 1.0, submission.info
        if submission.norm is not None:
            if self.aggregation.clip_norm is not None:
                clip = clip_factor(submission.norm, expert.norms, self.aggregation.clip_norm)
            info = info | {"norm": submission.norm} | ({"clip": clip} if clip < 1 else {})
            # So far below the usual that it must not become usual: then all others would be held.
            times, most = times_usual(submission.norm, expert.norms), self.aggregation.hold_norm
            if times is not None and most > 0 and times < 1 / most:
                info |= {"low": 1.0}
        sent = (submission.worker, submission.epoch, submission.sequence, submission.base_version, submission.digest)
        coefficient = clip * self.aggregation.coefficient(staleness)
        return UpdateAccepted(expert.name, *sent, staleness, coefficient, expert.version + 1, at, info)

    def hold(self, update: UpdateAccepted, size: int, token: str, suspicion: str = "") -> UpdateHeld | None:
        """The update as it waits for an administrator; None if it may land as it is.

        It waits if it would land with more than `hold_norm` times the usual norm, or for another `suspicion`. Raises
        RefusedError if too many wait already.
        """
        reason = suspicion or self._unusual(update)
        if not reason:
            return None
        number, newest = self.quarantine.number + 1, self.expert(update.expert).version
        sent = (update.expert, *update.identity, update.base_version, update.digest)
        held = UpdateHeld(number, *sent, size, newest, update.staleness, reason, token, update.at, update.info)
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
        """Reject the held update of this number: it will never land."""
        held = self.quarantine.numbered(number)
        named = (held.expert, held.worker, held.epoch, held.sequence, held.digest)
        event = HeldUpdateRejected(self.quarantine.number + 1, number, *named, reason, at)
        self.apply(event)
        return event

    def apply(
        self,
        event: Event,
        delta: FloatVector | None = None,
        rebuilt: RuleState | None = None,
        gateway: Adapter | None = None,
        since: tuple[CountedUpdate, ...] = (),
    ) -> None:
        """Apply one event as `transitions` says, with what it needs beside itself; see `EventInputs`."""
        inputs = EventInputs(self.aggregation.rule, delta, rebuilt, gateway, since)
        change = TRANSITIONS[type(event)]
        if change.expert is not None:
            expert = change.expert(self.experts, event, inputs)
            self.experts[expert.name] = expert
        if isinstance(event, RollEvent):
            self.roll_changes += 1
        if isinstance(event, ExpertRegistered | RollEvent):
            self._bind_manifest()
        if change.gateway is not None and self.online_gateway is not None:
            self.online_gateway = change.gateway(self.online_gateway, event, inputs)
        if not isinstance(event, QuarantineEvent):
            self.gateway_version += 1
        self.quarantine = self.quarantine.after(event)
        self.events.append(event)
        made = self.experts[event.expert] if isinstance(event, VersionEvent) else None
        merged = self.online_gateway if isinstance(event, GatewayMerged) else None
        self.version_digests.append(made.digest if made else merged.digest if merged else None)

    def _bind_manifest(self) -> None:
        """Let the experts decide on the manifest, and begin the gateway anew, where none is or was bound by it."""
        manifest = binding_manifest(self.experts)
        if manifest is None or self.manifest is None:
            self.manifest = manifest
            self.online_gateway = self.aggregation.first_gateway(manifest) if manifest is not None else None
