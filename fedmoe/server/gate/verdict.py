"""The gate's rule: compares gateways by held-out losses on their worst domain.

A gateway is as good as its worst domain: the least share of a domain's gain that it keeps. A domain's gain is what its
own expert gains on the base model, or the published gateway where that gains more: an expert that got worse must not
make its domain count for less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedmoe.wire.contract.experts import GatewayScores

#: Below this gain of a domain, in nats per token, a share of it says nothing.
SMALLEST_GAIN = 0.01
#: No evaluator counts for more than this many times the median of its domain, whatever number of tokens it claims.
_LARGEST_WEIGHT = 4.0


@dataclass(frozen=True)
class GateDecision:
    """The gateway to serve from now on (None: none can be), why, and what each gateway keeps of every domain's gain."""

    serve: str | None
    reason: str
    retained: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def judge(
    scores: Sequence[GatewayScores], candidates: Sequence[str], published: str | None = None, tolerance: float = 0.01
) -> GateDecision:
    """The candidate with the best worst domain, if that is not more than `tolerance` below the published one's.

    `tolerance` is a share of a domain's gain (0.01: one point). Scores that lack one of the gateways are left out, as
    only the same tokens compare; domains that gain less than `SMALLEST_GAIN` are not judged. With nothing to judge, or
    no candidate good enough, the published gateway stays.
    """
    if not candidates:
        return GateDecision(published, "there is no candidate")
    names = [*dict.fromkeys([*([published] if published else []), *candidates])]
    losses = [(score, _losses(score, published)) for score in scores]
    complete = [(score, gateways) for score, gateways in losses if gateways.keys() >= set(names)]
    retained = _retained(complete, names, published)
    if not retained[names[0]]:
        reason = f"no own expert gains {SMALLEST_GAIN:g} nats per token or more, so nothing could be kept of a gain"
        if not complete:
            measured = f"nobody measured all of {', '.join(names)} on the same tokens"
            reason = f"{measured}; {len(scores)} scores were given"
        return GateDecision(published, reason)
    worst = {name: min(shares.items(), key=lambda item: item[1]) for name, shares in retained.items()}
    best = max(candidates, key=lambda name: worst[name][1])
    text = f"{best} keeps {_percent(worst[best][1])} of the gain on its worst domain, {worst[best][0]}"
    rest = sorted({score.expert for score in scores} - retained[best].keys())
    unjudged = f"; not judged: {', '.join(rest)}" if rest else ""
    if published is None:
        return GateDecision(best, f"{text}; there is none to compare with{unjudged}", retained)
    before = f"{published} keeps {_percent(worst[published][1])} on its worst, {worst[published][0]}"
    if worst[best][1] < worst[published][1] - tolerance:
        lower = f"{text}, but {before}: more than {_percent(tolerance)} lower{unjudged}"
        return GateDecision(published, lower, retained)
    return GateDecision(best, f"{text}; {before}{unjudged}", retained)


def _losses(score: GatewayScores, published: str | None) -> dict[str, float]:
    """Gateway -> loss, the published one's under its name."""
    if published is None or score.published is None:
        return score.candidates
    return score.candidates | {published: score.published}


def _retained(
    complete: Sequence[tuple[GatewayScores, Mapping[str, float]]], names: Sequence[str], published: str | None
) -> dict[str, dict[str, float]]:
    """Gateway -> domain -> share of the domain's gain, over all evaluators that measured every gateway."""
    retained: dict[str, dict[str, float]] = {name: {} for name in names}
    for domain in dict.fromkeys(score.expert for score, _ in complete):
        here = [(score, gateways) for score, gateways in complete if score.expert == domain]
        weights = _weights([score.tokens for score, _ in here])
        base = _mean([score.base for score, _ in here], weights)
        gains = {name: base - _mean([gateways[name] for _, gateways in here], weights) for name in names}
        own = base - _mean([score.own for score, _ in here], weights)
        gain = own if published is None else max(own, gains[published])
        if gain >= SMALLEST_GAIN:
            for name in names:
                retained[name][domain] = gains[name] / gain
    return retained


def _weights(tokens: Sequence[int]) -> list[float]:
    ordered = sorted(tokens)
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return [min(count, _LARGEST_WEIGHT * median) for count in tokens]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
