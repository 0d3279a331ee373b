"""The online gateway: where each expert branched from it, which are ready to be merged, and the plan of a merge.

All is decided here, on values; `fedmoe.lora.online_merge` does the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from fedmoe.experts import ExpertModel
from fedmoe.federation.events import (
    CountedUpdate,
    Event,
    EventInputs,
    ExpertRebased,
    ExpertRegistered,
    ExpertUnretired,
    GatewayMerged,
    UpdateAccepted,
    VersionEvent,
)
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.algebra import TruncatedAdapter
from fedmoe.lora.codec import digest
from fedmoe.lora.moments import InputMoments, thin_notes
from fedmoe.lora.online_merge import ExpertDelta, add_into_gateway, merge_into_gateway


@dataclass(frozen=True, slots=True)
class BranchPoint:
    """Where an expert branched from the gateway, None before any merge, and what landed on it since, in order."""

    rebased: ExpertRebased | None = None
    since: tuple[CountedUpdate, ...] = ()

    @property
    def gateway(self) -> int:
        """Number of the merge that made the gateway it branched from."""
        return self.rebased.gateway if self.rebased is not None else 0

    @property
    def version(self) -> int:
        """The expert's version when it branched."""
        return self.rebased.version if self.rebased is not None else 0

    @property
    def steps(self) -> int:
        """Steps that its workers trained since."""
        return sum(update.steps for update in self.since)

    def ready(self, merge_after: int, idle_since: float) -> bool:
        """Whether its workers trained enough, or anything and then nothing after `idle_since`, seconds."""
        steps = self.steps
        return steps >= merge_after or (steps > 0 and self.since[-1].update.at <= idle_since)

    def unseen(self, merged: BranchPoint, buffer_size: int) -> tuple[CountedUpdate, ...] | None:
        """What a merge of the expert as it was then does not hold: what landed since, or only waited in the buffer.

        None if the expert has not only trained on: it was rolled back, or a worker retracted from it.
        """
        seen = len(merged.since)
        if self.rebased != merged.rebased or self.since[:seen] != merged.since:
            return None
        return self.since[seen - seen % buffer_size :]


@dataclass(frozen=True)
class OnlineGateway:
    """The gateway after its last merge, and how far each expert is from it; a value, replaced and never altered.

    `digest` is the content hash of the `adapter`; `sources` are the versions merged last and `weights` what their
    deltas were multiplied with, by expert; `reported` is the last step counter of every worker of an expert.
    """

    adapter: Adapter
    digest: str
    last: GatewayMerged | None = None
    sources: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    weights: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    branch_points: Mapping[str, BranchPoint] = field(default_factory=lambda: MappingProxyType({}))
    reported: Mapping[tuple[str, str], int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def number(self) -> int:
        """Merges so far."""
        return self.last.number if self.last is not None else 0

    def after_registration(self, event: ExpertRegistered, inputs: EventInputs) -> OnlineGateway:
        """With a new expert, which branches from the gateway before any merge."""
        return self._branched(event.expert, BranchPoint())

    def after_update(self, event: UpdateAccepted, inputs: EventInputs) -> OnlineGateway:
        """With one update more since its expert's branch point."""
        key, steps = (event.expert, event.worker), reported_steps(event)
        landed = CountedUpdate(event, steps_between(self.reported.get(key), steps))
        before = self.branch_points[event.expert]
        counted = self._branched(event.expert, replace(before, since=(*before.since, landed)))
        reported = self.reported if steps is None else MappingProxyType({**self.reported, key: steps})
        return replace(counted, reported=reported)

    def after_rebuild(self, event: VersionEvent, inputs: EventInputs) -> OnlineGateway:
        """With an expert that is made of other updates since its branch point."""
        return self._branched(event.expert, replace(self.branch_points[event.expert], since=inputs.since))

    def after_rebase(self, event: ExpertRebased, inputs: EventInputs) -> OnlineGateway:
        """With an expert that branches from the newest gateway."""
        return self._branched(event.expert, BranchPoint(event, inputs.since))

    def after_merge(self, event: GatewayMerged, inputs: EventInputs) -> OnlineGateway:
        """With the weights of the next merge."""
        assert inputs.gateway is not None, "a merge is applied with its adapter"
        return self.merged(event).with_adapter(inputs.gateway)

    def after_return(self, event: ExpertUnretired, inputs: EventInputs) -> OnlineGateway:
        """With an expert that is back, and branches where it did."""
        return self._branched(event.expert, self.branch_points.get(event.expert, BranchPoint()))

    def _branched(self, expert: str, branch_point: BranchPoint) -> OnlineGateway:
        return replace(self, branch_points=MappingProxyType({**self.branch_points, expert: branch_point}))

    def with_adapter(self, adapter: Adapter) -> OnlineGateway:
        """With other weights."""
        return replace(self, adapter=adapter, digest=digest(adapter))

    def recovered(self, expert: str, branch_point: BranchPoint, steps: Mapping[str, int]) -> OnlineGateway:
        """With an expert that branched there, and whose workers reported these step counters."""
        counters = {(expert, worker): count for worker, count in steps.items()}
        return replace(self._branched(expert, branch_point), reported=MappingProxyType({**self.reported, **counters}))

    def merged(self, event: GatewayMerged) -> OnlineGateway:
        """With one more merge, but the weights from before it; the experts' rebases are events of their own."""
        return replace(
            self,
            last=event,
            sources=MappingProxyType({**self.sources, **event.sources}),
            weights=MappingProxyType({**self.weights, **event.weights}),
        )


def reported_steps(update: UpdateAccepted) -> int | None:
    """The step counter a worker reported with its update, over all its restarts; None if it reported none.

    Nor does an update that was held for a while: its worker went on counting, and the next one reports those steps.
    """
    steps = update.info.get("steps")
    return None if steps is None or "held" in update.info else int(steps)


def steps_between(before: int | None, now: int | None) -> int:
    """Steps between two counters of a worker; one that starts anew counts from 0, one that reports none counts 1."""
    if now is None:
        return 1
    return now - before if before is not None and now >= before else now


def count_steps(events: Iterable[Event], updates: Sequence[UpdateAccepted]) -> tuple[CountedUpdate, ...]:
    """`updates` of ONE expert, each with its steps, which follow from all of its events."""
    counts: dict[int, int] = {}
    before: dict[str, int] = {}
    for event in events:
        if isinstance(event, UpdateAccepted):
            now = reported_steps(event)
            counts[event.version] = steps_between(before.get(event.worker), now)
            if now is not None:
                before[event.worker] = now
    return tuple(CountedUpdate(update, counts[update.version]) for update in updates)


def step_counters(events: Iterable[Event]) -> dict[str, int]:
    """The last step counter of every worker of ONE expert."""
    updates = (event for event in events if isinstance(event, UpdateAccepted))
    return {update.worker: steps for update in updates if (steps := reported_steps(update)) is not None}


@dataclass(frozen=True)
class MergePlan:
    """A merge about to be computed: the gateway as it is, and by name the ready experts as they are.

    `staleness` is the merges since each branched, `weights` what its delta counts. `moments` are the input
    moments of all that share the gateway, None where one of them lacks some, and `notes` say so.
    """

    gateway: OnlineGateway
    experts: Mapping[str, ExpertModel]
    staleness: Mapping[str, int]
    weights: Mapping[str, float]
    moments: Mapping[str, InputMoments] | None
    several: bool
    notes: tuple[str, ...]

    def compute(self, starts: Mapping[str, Adapter]) -> TruncatedAdapter:
        """The next gateway, from the adapters at which the ready experts had branched from it."""
        ready = {
            name: ExpertDelta(starts[name], expert.adapter, self.weights[name]) for name, expert in self.experts.items()
        }
        if self.moments is None:
            return add_into_gateway(self.gateway.adapter, ready, self.several)
        return merge_into_gateway(self.gateway.adapter, ready, self.moments)


def plan_merge(
    gateway: OnlineGateway,
    experts: Mapping[str, ExpertModel],
    moments: Mapping[str, InputMoments],
    merge_after: int,
    weight: Callable[[int], float],
    least_updates: int = 1,
    idle_since: float = -math.inf,
) -> MergePlan | None:
    """A merge of all experts that trained `merge_after` steps or more since they branched; None while there is none.

    Of idle experts, whose last update came at `idle_since` or before, fewer will do. `weight` gives what a delta counts
    by its staleness in merges; of fewer updates than `least_updates`, the size of the buffer, none has landed yet. An
    expert shares the gateway once it trains, until it is retired.
    """
    branch_points = {name: point for name, point in gateway.branch_points.items() if not experts[name].retired}
    ready = [
        name
        for name in sorted(branch_points)
        if branch_points[name].ready(merge_after, idle_since) and experts[name].updates >= least_updates
    ]
    if not ready:
        return None
    sharing = {name for name, point in branch_points.items() if point.steps > 0 or name in gateway.sources}
    missing = sorted(sharing - moments.keys())
    staleness = {name: gateway.number - branch_points[name].gateway for name in ready}
    moments = {name: moments[name] for name in sorted(moments.keys() & sharing)}
    early = tuple(
        f"{name} was merged after {branch_points[name].steps} of {merge_after} steps: nobody had trained it for a while"
        for name in ready
        if branch_points[name].steps < merge_after
    )
    note = f"without input moments of {', '.join(missing)} the deltas were added as they are, scaled"
    return MergePlan(
        gateway,
        {name: experts[name] for name in ready},
        staleness,
        {name: weight(tau) for name, tau in staleness.items()},
        None if missing else moments,
        len(sharing) > 1,
        early + ((note,) if missing else thin_notes({name: moments[name].tokens for name in moments})),
    )
