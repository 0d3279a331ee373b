"""The gate's rule: compares gateways by held-out losses on their worst domain.

A gateway is as good as its worst domain: the least share of a domain's gain that it keeps. A domain's gain is what its
own expert gains on the base model, or the published gateway where that gains more: an expert that got worse must not
make its domain count for less.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

#: Below this gain of a domain, in nats per token, a share of it says nothing.
SMALLEST_GAIN = 0.01
#: No evaluator counts for more than this many times the median of its domain, whatever number of tokens it claims.
_LARGEST_WEIGHT = 4.0


@dataclass(frozen=True)
class Scores:
    """What one evaluator measured on one domain, all on the same tokens: mean losses in nats per token.

    `gateways` holds the published gateway and the candidates by name. Raises ValueError for numbers that are none.
    """

    evaluator: str
    domain: str
    tokens: int
    base: float
    expert: float
    gateways: Mapping[str, float]

    def __post_init__(self) -> None:
        losses = (self.base, self.expert, *self.gateways.values())
        if self.tokens < 1 or not all(math.isfinite(loss) and loss >= 0 for loss in losses):
            raise ValueError(
                f"{self.evaluator} on {self.domain}: needs a positive number of tokens and finite losses of at least "
                f"0, got {self.tokens} tokens and {losses}"
            )


@dataclass(frozen=True)
class GateDecision:
    """The gateway to serve from now on (None: none can be), why, and what each gateway keeps of every domain's gain."""

    serve: str | None
    reason: str
    kept: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def judge(
    scores: Sequence[Scores], candidates: Sequence[str], published: str | None = None, tolerance: float = 0.01
) -> GateDecision:
    """The candidate with the best worst domain, if that is not more than `tolerance` below the published one's.

    `tolerance` is a share of a domain's gain (0.01: one point). Scores that lack one of the gateways are left out, as
    only the same tokens compare; domains that gain less than `SMALLEST_GAIN` are not judged. With nothing to judge, or
    no candidate good enough, the published gateway stays.
    """
    if not candidates:
        return GateDecision(published, "there is no candidate")
    names = [*dict.fromkeys([*([published] if published else []), *candidates])]
    kept = _kept(scores, names, published)
    if not kept[names[0]]:
        return GateDecision(published, _nothing_to_judge(scores, names))
    worst = {name: min(shares.items(), key=lambda item: item[1]) for name, shares in kept.items()}
    best = max(candidates, key=lambda name: worst[name][1])
    text = f"{best} keeps {_percent(worst[best][1])} of the gain on its worst domain, {worst[best][0]}"
    rest = sorted({score.domain for score in scores} - kept[best].keys())
    unjudged = f"; not judged: {', '.join(rest)}" if rest else ""
    if published is None:
        return GateDecision(best, f"{text}; there is none to compare with{unjudged}", kept)
    before = f"{published} keeps {_percent(worst[published][1])} on its worst, {worst[published][0]}"
    if worst[best][1] < worst[published][1] - tolerance:
        return GateDecision(published, f"{text}, but {before}: more than {_percent(tolerance)} lower{unjudged}", kept)
    return GateDecision(best, f"{text}; {before}{unjudged}", kept)


def _kept(scores: Sequence[Scores], names: Sequence[str], published: str | None) -> dict[str, dict[str, float]]:
    """gateway -> domain -> share of the domain's gain, over all evaluators that measured every gateway."""
    kept: dict[str, dict[str, float]] = {name: {} for name in names}
    complete = [score for score in scores if score.gateways.keys() >= set(names)]
    for domain in dict.fromkeys(score.domain for score in complete):
        here = [score for score in complete if score.domain == domain]
        weights = _weights([score.tokens for score in here])
        base = _mean([score.base for score in here], weights)
        gains = {name: base - _mean([score.gateways[name] for score in here], weights) for name in names}
        own = base - _mean([score.expert for score in here], weights)
        gain = own if published is None else max(own, gains[published])
        if gain >= SMALLEST_GAIN:
            for name in names:
                kept[name][domain] = gains[name] / gain
    return kept


def _weights(tokens: Sequence[int]) -> list[float]:
    ordered = sorted(tokens)
    median = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return [min(count, _LARGEST_WEIGHT * median) for count in tokens]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _nothing_to_judge(scores: Sequence[Scores], names: Sequence[str]) -> str:
    if not any(score.gateways.keys() >= set(names) for score in scores):
        return f"nobody measured all of {', '.join(names)} on the same tokens; {len(scores)} scores were given"
    return f"no own expert gains {SMALLEST_GAIN:g} nats per token or more, so there is nothing a gateway could keep"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
