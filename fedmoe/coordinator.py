"""Every decision of the coordinator, without I/O: who may land on what, with which weight, and what the gateway is.

`CentralCoordinator` publishes an immutable mapping of experts. A change is worked out on a `Draft`, written to the
journal by whoever owns one, and only then published; a draft that cannot be written is dropped and nothing happened.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from fedmoe.errors import RefusedError
from fedmoe.events import Event, ExpertRegistered, ExpertRolledBack, UpdateAccepted, WorkerRetracted
from fedmoe.experts import ExpertModel
from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.codec import digest
from fedmoe.lora.merge import STRATEGIES, STRATEGIES_WITH_MOMENTS, Merged, merge
from fedmoe.lora.moments import InputMoments
from fedmoe.lora.robust import clip_factor
from fedmoe.lora.update_rules import RULES, STALENESS, RuleState, UpdateRule, buffered
from fedmoe.manifest import Manifest

#: What the gateway is made with while an expert lacks the input moments that the chosen strategy needs.
WITHOUT_MOMENTS = "scaled"
#: With moments and without a rank given, the gateway keeps this share of every module's energy, at rank 64 or less.
ENERGY = 0.99


@dataclass(frozen=True, slots=True)
class Aggregation:
    """How updates are weighed and the gateway is made.

    `max_staleness` None accepts any age; `clip_norm` scales an update down to so many times the usual norm, None never.
    With `evaluation_gate` the gateway is not a view of the newest experts but what held-out losses let through.
    """

    server_learning_rate: float = 1.0
    staleness: str = "polynomial"
    max_staleness: int | None = None
    server_optimizer: str = "sgd"
    buffer_size: int = 1
    clip_norm: float | None = None
    enable_gateway: bool = True
    strategy: str = "weighted_average"
    gateway_rank: int | None = None
    evaluation_gate: bool = False

    def __post_init__(self) -> None:
        for value, known, name in (
            (self.staleness, STALENESS, "staleness"),
            (self.server_optimizer, RULES, "server_optimizer"),
            (self.strategy, STRATEGIES | STRATEGIES_WITH_MOMENTS, "strategy"),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}; known: {', '.join(sorted(known))}")

    @property
    def rule(self) -> UpdateRule:
        return buffered(RULES[self.server_optimizer], self.buffer_size)

    @property
    def uses_moments(self) -> bool:
        """Whether a gateway is made with the input moments of its experts; the gate tries such a strategy as well."""
        return self.evaluation_gate or self.strategy in STRATEGIES_WITH_MOMENTS

    def coefficient(self, staleness: int) -> float:
        """What a delta of this staleness is multiplied with, lr * s(tau)."""
        return self.server_learning_rate * STALENESS[self.staleness](staleness)


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


@dataclass(frozen=True, eq=False)
class ExpertMoments:
    """The input moments of all that an expert's workers train on, and the sha256 of their bytes as hex."""

    moments: InputMoments
    digest: str


@dataclass(frozen=True)
class GatewayModel:
    """The model made of all experts: a view of `{expert: version}`, reproducible from them by hash.

    `scale` is the factor on the whole product, where the strategy has one; `statistics` are the digests of the input
    moments it was made with, by expert; `strategy` is the one that was used, and `notes` say in words where that is not
    the one asked for.
    """

    adapter: Adapter
    version: int
    sources: Mapping[str, int]
    weights: Mapping[str, float]
    strategy: str
    truncation_error: float
    digest: str
    statistics: Mapping[str, str]
    notes: tuple[str, ...]
    scale: float = 1.0

    @classmethod
    def build(
        cls,
        version: int,
        experts: Mapping[str, ExpertModel],
        aggregation: Aggregation,
        moments: Mapping[str, ExpertMoments] = MappingProxyType({}),
        scale: float | None = None,
    ) -> GatewayModel:
        """Merge the experts as they are now.

        `gateway_rank` None keeps the merge exact; one with moments keeps `ENERGY` of it. Where the strategy needs
        `moments` and an expert has none, it is `WITHOUT_MOMENTS` instead, and `notes` say so. `scale` None is the
        strategy's own.
        """
        known = {name: moments[name] for name in sorted(experts.keys() & moments.keys())}
        with_moments = aggregation.strategy in STRATEGIES_WITH_MOMENTS and known.keys() == experts.keys()
        merged: Merged = merge(
            {name: expert.adapter for name, expert in experts.items()},
            aggregation.strategy,
            rank=aggregation.gateway_rank,
            energy=ENERGY if with_moments and aggregation.gateway_rank is None else None,
            scale=scale,
            moments={name: found.moments for name, found in known.items()},
            without_moments=WITHOUT_MOMENTS,
        )
        sources = {name: experts[name].version for name in sorted(experts)}
        return cls(
            merged.adapter,
            version,
            MappingProxyType(sources),
            MappingProxyType(dict(merged.weights)),
            merged.strategy,
            merged.truncation_error,
            digest(merged.adapter),
            MappingProxyType({name: found.digest for name, found in known.items()} if with_moments else {}),
            merged.notes,
            merged.scale,
        )


@dataclass(frozen=True, slots=True)
class DraftMark:
    """A point in a draft to go back to."""

    experts: dict[str, ExpertModel]
    manifest: Manifest | None
    gateway_version: int
    events: int
    moments: dict[str, ExpertMoments]


@dataclass
class Draft:
    """Changes under way: sees what is published plus what it has decided so far."""

    aggregation: Aggregation
    experts: dict[str, ExpertModel]
    manifest: Manifest | None
    gateway_version: int
    events: list[Event] = field(default_factory=list)
    moments: dict[str, ExpertMoments] = field(default_factory=dict)

    def mark(self) -> DraftMark:
        """The point reached so far."""
        return DraftMark(dict(self.experts), self.manifest, self.gateway_version, len(self.events), dict(self.moments))

    def restore(self, mark: DraftMark) -> None:
        """Forget everything since `mark`."""
        self.experts, self.manifest, self.gateway_version = dict(mark.experts), mark.manifest, mark.gateway_version
        del self.events[mark.events :]
        self.moments = dict(mark.moments)

    def expert(self, name: str) -> ExpertModel:
        """The expert, or a refusal that lists which there are."""
        return _expert(self.experts, name)

    def register(self, name: str, worker: str, manifest: Manifest, seed: int | None, at: float) -> ExpertModel:
        """The expert of this name, made now if it is new; a manifest unlike the federation's is refused."""
        if self.manifest is not None:
            check_manifest(self.manifest, manifest)
        if name in self.experts:
            return self.experts[name]
        chosen = seed if seed is not None else seed_of(name)
        self.apply(ExpertRegistered(name, worker, manifest, chosen, at))
        return self.experts[name]

    def learn_moments(self, name: str, moments: ExpertMoments | None) -> None:
        """New moments of an expert's inputs; None where the gateway is made without, and its version rises the same."""
        if moments is not None:
            self.moments[name] = moments
        self.gateway_version += 1

    def judge(self, submission: Submission, at: float) -> UpdateAccepted:
        """What accepting this update would mean; refuses future and too stale base versions."""
        expert = self.expert(submission.expert)
        staleness = expert.staleness(submission.base_version)
        limit = self.aggregation.max_staleness
        if limit is not None and staleness > limit:
            raise RefusedError(
                "too_stale",
                f"the update is {staleness} versions behind {expert.name} version {expert.version}; "
                f"at most {limit} are accepted.",
                "Pull the newest version, rebase the local weights onto it and push again.",
                newest_version=expert.version,
                staleness=staleness,
            )
        clip, info = self._clip(expert, submission.norm), submission.info
        if submission.norm is not None:
            info = info | {"norm": submission.norm} | ({"clip": clip} if clip < 1 else {})
        return UpdateAccepted(
            submission.expert,
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

    def roll_back(self, name: str, to_version: int, state: RuleState, reason: str, at: float) -> ExpertRolledBack:
        """The expert's next version gets `state`, rebuilt by the caller from version `to_version`."""
        expert = self.expert(name)
        event = ExpertRolledBack(name, to_version, expert.version + 1, reason, at)
        self.apply(event, rebuilt=state)
        return event

    def retract(
        self, name: str, worker: str, removed: int, state: RuleState, reason: str, at: float
    ) -> WorkerRetracted:
        """The expert's next version gets `state`, rebuilt by the caller without the worker's updates."""
        expert = self.expert(name)
        event = WorkerRetracted(name, worker, removed, expert.version + 1, reason, at)
        self.apply(event, rebuilt=state)
        return event

    def apply(self, event: Event, delta: FloatVector | None = None, rebuilt: RuleState | None = None) -> None:
        """Fold one event in: an update needs its delta, a rollback or retraction the rebuilt state."""
        rule = self.aggregation.rule
        match event:
            case ExpertRegistered():
                self.manifest = self.manifest or event.manifest
                self.experts[event.expert] = ExpertModel.initial(event.expert, event.manifest, event.seed, rule)
            case UpdateAccepted():
                assert delta is not None, "an accepted update is applied with its delta"
                landed = self.experts[event.expert].land(delta, event.coefficient, rule)
                self.experts[event.expert] = landed.remember(event.landed_norm)
            case ExpertRolledBack() | WorkerRetracted():
                assert rebuilt is not None, "a rollback or retraction is applied with the rebuilt state"
                self.experts[event.expert] = self.experts[event.expert].become(rebuilt)
        self.gateway_version += 1
        self.events.append(event)


class CentralCoordinator:
    """The experts of a federation and the gateway made of them, as one consistent view for any number of readers.

    One writer at a time drafts and publishes; readers take `experts` or `gateway()` whenever they like.
    """

    def __init__(self, aggregation: Aggregation | None = None, enable_gateway: bool | None = None) -> None:
        chosen = aggregation or Aggregation()
        self.aggregation = chosen if enable_gateway is None else replace(chosen, enable_gateway=enable_gateway)
        self.manifest: Manifest | None = None
        # Experts, the gateway's version and the experts' moments, swapped together: no reader sees half a change.
        self._view: tuple[Mapping[str, ExpertModel], int, Mapping[str, ExpertMoments]] = (
            MappingProxyType({}),
            0,
            MappingProxyType({}),
        )
        self._gateway: GatewayModel | None = None
        self._building = threading.Lock()

    @property
    def experts(self) -> Mapping[str, ExpertModel]:
        """All experts by name, as last published."""
        return self._view[0]

    @property
    def gateway_version(self) -> int:
        """Rises with every accepted update, and with every other change of what the gateway is made of."""
        return self._view[1]

    def draft(self) -> Draft:
        """A working copy to decide changes on."""
        experts, version, moments = self._view
        return Draft(self.aggregation, dict(experts), self.manifest, version, moments=dict(moments))

    def publish(self, draft: Draft) -> None:
        """Make a draft what everybody sees."""
        self.manifest = draft.manifest
        experts, moments = MappingProxyType(dict(draft.experts)), MappingProxyType(dict(draft.moments))
        self._view = (experts, draft.gateway_version, moments)

    def expert(self, name: str) -> ExpertModel:
        """The expert, or a refusal that lists which there are."""
        return _expert(self.experts, name)

    def register_expert(self, name: str, manifest: Manifest, seed: int | None = None, at: float = 0.0) -> ExpertModel:
        """Make an expert, or get the one there is; for use inside one process."""
        draft = self.draft()
        expert = draft.register(name, "local", manifest, seed, at)
        self.publish(draft)
        return expert

    def push_update(self, submission: Submission, delta: FloatVector, at: float = 0.0) -> UpdateAccepted:
        """Judge an update and land it; for use inside one process."""
        draft = self.draft()
        accepted = draft.judge(submission, at)
        draft.apply(accepted, delta)
        self.publish(draft)
        return accepted

    def gateway(self) -> GatewayModel:
        """The gateway of the newest state, built when first asked for and kept until something changes."""
        if not self.aggregation.enable_gateway:
            raise RefusedError(
                "gateway_disabled",
                "this coordinator runs without a gateway (enable_gateway is off).",
                "Start it with --enable-gateway, or pull the experts one by one.",
            )
        with self._building:
            experts, version, moments = self._view
            if not experts:
                raise RefusedError(
                    "gateway_not_initialised",
                    "the gateway is made of experts and there is none yet.",
                    "Start at least one worker, or register an expert with 'fedmoe experts create'.",
                )
            if self._gateway is None or self._gateway.version != version:
                self._gateway = GatewayModel.build(version, experts, self.aggregation, moments)
            return self._gateway


def _expert(experts: Mapping[str, ExpertModel], name: str) -> ExpertModel:
    if name not in experts:
        known = ", ".join(sorted(experts)) or "none"
        raise RefusedError(
            "unknown_expert", f"there is no expert {name!r}; registered: {known}.", "Register it first (workers do)."
        )
    return experts[name]


def check_manifest(expected: Manifest, got: Manifest) -> None:
    """Refuse a worker whose base model or LoRA configuration is not the federation's."""
    found = expected.differences(got)
    if not found:
        return
    shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
    if expected.base.weights_hash != got.base.weights_hash or expected.base.tokenizer_hash != got.base.tokenizer_hash:
        raise RefusedError(
            "base_mismatch",
            f"all experts share one base model; {shown}.",
            "Use the base model (and revision) the coordinator names.",
            expected=expected.base.weights_hash,
            got=got.base.weights_hash,
        )
    raise RefusedError(
        "lora_mismatch",
        f"all experts share one LoRA configuration; {shown}.",
        "Start the worker with the same --lora-r, --lora-alpha and --target-modules.",
    )


def seed_of(name: str) -> int:
    """The seed of an expert's first A: shared by all workers of an expert, different between experts."""
    return int.from_bytes(hashlib.sha256(json.dumps(["fedmoe-initial-a", name]).encode()).digest()[:8], "little")
