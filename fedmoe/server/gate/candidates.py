"""Candidate gateways: which are offered, when a set is decided, and whether its best replaces the published one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedmoe.coordinator import ONLINE_STRATEGY, Aggregation, ExpertMoments, GatewayModel
from fedmoe.experts import ExpertModel
from fedmoe.federation.gateway_members import members
from fedmoe.federation.online_gateway import OnlineGateway
from fedmoe.lora.algebra import scaled
from fedmoe.lora.codec import digest
from fedmoe.lora.manifest import BaseModel
from fedmoe.lora.merge import STRATEGIES, STRATEGIES_WITH_MOMENTS
from fedmoe.server.gate.verdict import GateDecision, judge
from fedmoe.wire.contract.experts import GatewayScores

#: Scales that are tried, by strategy: multiples of the mean for the plain stack, around the measured best for regmean.
#: Each one costs every owner a pass over the held-out data, so there are few.
SCALES: dict[str, tuple[float, ...]] = {"scaled": (1.2, 1.8, 2.4), "regmean": (1.1, 1.3, 1.5)}

#: An evaluator and the expert whose domain it scores.
Evaluator = tuple[str, str]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A gateway to score: `model` has scale 1, and the candidate is `scale` times its product."""

    name: str
    model: GatewayModel
    scale: float

    def gateway(self) -> GatewayModel:
        """The candidate as a gateway of its own: the factor goes into B, so alpha stays the rank."""
        if self.scale == 1.0:
            return self.model
        adapter = scaled(self.model.adapter, self.scale)
        return replace(self.model, adapter=adapter, digest=digest(adapter), scale=self.scale)


@dataclass(frozen=True, eq=False)
class CandidateSet:
    """What evaluators score together: the experts of one moment, what can be made of them, and what is out now."""

    id: str
    opened_at: float
    version: int
    experts: Mapping[str, ExpertModel]
    candidates: tuple[Candidate, ...]
    published: GatewayModel | None

    @property
    def sources(self) -> dict[str, int]:
        """Expert -> version."""
        return {name: self.experts[name].version for name in sorted(self.experts)}

    @property
    def base(self) -> BaseModel:
        """The base model that all of it belongs on."""
        return next(iter(self.experts.values())).manifest.base


def offered(aggregation: Aggregation, count: int, with_moments: bool) -> list[tuple[str, tuple[float, ...]]]:
    """The strategies to try and their scales: the plain stack of `count` experts, regmean where moments are there.

    The strategy asked for is always among them, `weighted_average` and `sum` as scales of the stack. One expert alone
    is the gateway by every strategy, and so is the base model while there is none.
    """
    if count <= 1:
        return [("scaled", (1.0,))]
    asked = STRATEGIES.get(aggregation.strategy)
    own = asked.weight(count) if asked is not None and asked.scale is None else None
    plain = {round(min(1.0, over / count), 6) for over in SCALES["scaled"]} | ({own} if own is not None else set())
    strategies = [("scaled", tuple(sorted(plain)))]
    if asked is not None and asked.by_expert is not None:
        strategies.append((aggregation.strategy, (1.0,)))
    return strategies + ([(name, SCALES[name]) for name in STRATEGIES_WITH_MOMENTS] if with_moments else [])


def make_candidates(
    version: int,
    experts: Mapping[str, ExpertModel],
    aggregation: Aggregation,
    moments: Mapping[str, ExpertMoments],
    online_gateway: OnlineGateway | None = None,
) -> tuple[Candidate, ...]:
    """All candidates of one state: a merge for each strategy, shared by its scales; or the online gateway alone."""
    if online_gateway is not None:
        model = replace(GatewayModel.of_online_gateway(online_gateway, version, moments), online_gateway=None)
        return (Candidate(ONLINE_STRATEGY, model, 1.0),)
    made, trained = [], members(experts, aggregation.buffer_size)
    for strategy, scales in offered(aggregation, len(trained), moments.keys() >= trained.keys()):
        chosen = replace(aggregation, strategy=strategy)
        model = GatewayModel.build(version, experts, chosen, moments, scale=1.0)
        made += [Candidate(f"{strategy} x{scale:.3g}", model, scale) for scale in scales]
    return tuple(made)


def outcome(
    opened_at: float, now: float, seconds: float, scored: Collection[Evaluator], heard: Mapping[Evaluator, float]
) -> Literal["wait", "judge", "undecided"]:
    """What becomes of an open set: judged once all who are waited for have scored, undecided after `seconds`."""
    if scored and not waiting_for(opened_at, seconds, scored, heard):
        return "judge"
    return "undecided" if now - opened_at >= seconds else "wait"


def waiting_for(
    opened_at: float, seconds: float, scored: Collection[Evaluator], heard: Mapping[Evaluator, float]
) -> list[Evaluator]:
    """Who has still to score a set, in name order: whoever was heard of since it was opened, or shortly before.

    `heard` says when each evaluator was last heard of; shortly is as long as a set may stay open. So nobody drops out
    of a set because its scores take long.
    """
    return sorted(evaluator for evaluator, at in heard.items() if opened_at - at < seconds and evaluator not in scored)


def decide(
    offer: CandidateSet, scores: Sequence[GatewayScores], tolerance: float, taken_back: Collection[str] = ()
) -> GateDecision:
    """Which candidate goes out, if any; the name served is the published gateway's where it stays.

    Experts in `taken_back` were rolled back or retracted from after the published gateway was made: it then counts for
    nothing, and the best candidate takes its place.
    """
    before = None if offer.published is None else f"version {offer.published.version}"
    compared = None if taken_back else before
    verdict = judge(scores, [candidate.name for candidate in offer.candidates], compared, tolerance)
    reason = verdict.reason
    if taken_back and before is not None:
        reason += f"; {before} does not count: it holds what was taken back from {', '.join(sorted(taken_back))}"
    unheard = sorted(offer.experts.keys() - {score.expert for score in scores})
    if unheard:
        reason += f"; without an evaluator's scores: {', '.join(unheard)}"
    return GateDecision(verdict.serve or before, reason, verdict.retained)
