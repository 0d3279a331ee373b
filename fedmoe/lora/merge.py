"""Merge strategies: several experts become one adapter, by an exact sum of their products or by RegMean."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedmoe.lora.adapter import Adapter, ShapeError
from fedmoe.lora.algebra import TruncatedAdapter, recompress, stack
from fedmoe.lora.kept_terms import KeptTerms
from fedmoe.lora.moments import InputMoments, thin_notes
from fedmoe.lora.regmean import RANK_CAP, SCALE, regmean

# How much more than the mean of the experts where nothing better is known: with three the best of two measurements were
# 1.5 and 2.25. A share of the sum would not do: with ten experts 0.6 of it left less than the base model.
_OVER_MEAN = 1.8


@dataclass(frozen=True)
class MergeResult:
    """A merged adapter and how it was made.

    The product is `scale` times the sum of `weights` times the experts' products, or what `regmean` makes of them.
    `truncation_error` is what a rank cut lost, relative, 0 when nothing was cut (of outputs for `regmean`, else of the
    product); `strategy` is the one that was used and `notes` say in words what else was done.
    """

    adapter: Adapter
    weights: Mapping[str, float]
    truncation_error: float
    strategy: str
    scale: float = 1.0
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        return self.adapter.rank


@dataclass(frozen=True, slots=True)
class MergeStrategy:
    """A merge strategy: the weight of each of `count` experts, and the scale for as many if it has one.

    With `by_expert` the weights are what it makes of the experts instead.
    """

    weight: Callable[[int], float]
    scale: Callable[[int], float] | None = None
    by_expert: Callable[[Mapping[str, Adapter]], Mapping[str, float]] | None = None

    def weights(self, experts: Mapping[str, Adapter]) -> dict[str, float]:
        """The weight of every expert; raises ValueError where `by_expert` gives others, or none that is finite."""
        if self.by_expert is None:
            return dict.fromkeys(experts, self.weight(len(experts)))
        weights = {name: float(weight) for name, weight in self.by_expert(experts).items()}
        if weights.keys() != experts.keys() or not all(map(math.isfinite, weights.values())):
            raise ValueError(f"a finite weight is needed for each of {', '.join(experts)}; got {weights}")
        return {name: weights[name] for name in experts}


def damping(count: int) -> float:
    """The scale of `scaled` for `count` experts: 1.8 times the mean, but never more than the sum."""
    return min(1.0, _OVER_MEAN / count)


#: Strategy name -> what it does, for those that need nothing but the experts.
STRATEGIES: dict[str, MergeStrategy] = {
    "weighted_average": MergeStrategy(lambda count: 1.0 / count),
    "sum": MergeStrategy(lambda count: 1.0),
    "concat": MergeStrategy(lambda count: 1.0),  # `sum` by the name that other tools give to the exact stack
    "scaled": MergeStrategy(lambda count: 1.0, scale=damping),
}
#: Those that need the input moments of every expert as well.
STRATEGIES_WITH_MOMENTS: dict[str, MergeStrategy] = {
    "regmean": MergeStrategy(lambda count: 1.0, scale=lambda count: SCALE if count > 1 else 1.0)
}


def _strategy(name: str) -> MergeStrategy:
    strategies = STRATEGIES | STRATEGIES_WITH_MOMENTS
    if name not in strategies:
        raise ValueError(f"unknown strategy {name!r}; known: {', '.join(sorted(strategies))}")
    return strategies[name]


@dataclass(frozen=True, slots=True)
class MergePlan:
    """How a merge will be made: the strategy that is used, each expert's weight in name order, the scale, and notes."""

    strategy: str
    weights: Mapping[str, float]
    scale: float
    notes: tuple[str, ...]


def plan_merge(
    experts: Mapping[str, Adapter],
    strategy: str = "weighted_average",
    *,
    scale: float | None = None,
    tokens: Mapping[str, int] | None = None,
    without_moments: str | None = None,
) -> MergePlan:
    """What `merge` decides before it computes; `tokens` are those of the input moments there are, by expert."""
    tokens = tokens or {}
    used, notes = _strategy_in_reach(strategy, experts, tokens, without_moments)
    if not experts:
        raise ValueError("there is no expert to merge yet; a worker has to register one first")
    ordered = {name: experts[name] for name in sorted(experts)}
    weights = _strategy(used).weights(ordered)
    if used in STRATEGIES_WITH_MOMENTS:
        notes += thin_notes({name: tokens[name] for name in ordered})
    return MergePlan(used, weights, _scale(used, scale if used == strategy else None, len(weights)), notes)


def merge(
    experts: Mapping[str, Adapter],
    strategy: str = "weighted_average",
    *,
    rank: int | None = None,
    energy: float | None = None,
    scale: float | None = None,
    moments: Mapping[str, InputMoments] | None = None,
    without_moments: str | None = None,
    kept: KeptTerms | None = None,
) -> MergeResult:
    """Merge experts exactly in the product, scale * sum_k w_k s_k B_k A_k, or by `regmean`; cut only if asked.

    The result has the sum of ranks, or the full rank of the largest module where that is smaller; or `rank`; or with
    `energy` in (0, 1] the smallest rank that keeps this share of every module, at most `rank` (64 if not given).
    `scale` is for `scaled` and `regmean`. `without_moments` names the strategy to take where `regmean` lacks the
    moments of an expert, which is an error otherwise.
    `kept` holds what `regmean` need not compute again.
    The order of `experts` does not matter: sources are taken in name order, so the bytes are the same.
    """
    if rank is not None and rank < 1:
        raise ShapeError(f"the gateway's rank must be at least 1, got {rank}")
    moments = moments or {}
    tokens = {name: of_expert.tokens for name, of_expert in moments.items()}
    plan = plan_merge(experts, strategy, scale=scale, tokens=tokens, without_moments=without_moments)
    if plan.strategy in STRATEGIES_WITH_MOMENTS:
        result = regmean(experts, moments, plan.scale, weights=plan.weights, rank=rank, energy=energy, kept=kept)
    else:
        terms = [(plan.scale * weight, experts[name]) for name, weight in plan.weights.items()]
        result = _cut(stack(terms), rank, energy)
    return MergeResult(result.adapter, plan.weights, result.truncation_error, plan.strategy, plan.scale, plan.notes)


def _strategy_in_reach(
    strategy: str, experts: Mapping[str, Adapter], tokens: Mapping[str, int], otherwise: str | None
) -> tuple[str, tuple[str, ...]]:
    """The strategy asked for, or where moments are missing the one named for that case, with a note."""
    _strategy(strategy)
    missing = sorted(experts.keys() - tokens.keys())
    if strategy not in STRATEGIES_WITH_MOMENTS or not missing:
        return strategy, ()
    if otherwise is None:
        raise ValueError(
            f"{strategy} needs the input moments of every expert and has none of {missing}; collect them on the "
            "experts' training text, or name a strategy to take without them"
        )
    if otherwise not in STRATEGIES:
        raise ValueError(f"{otherwise!r} is no strategy without moments; choose from {', '.join(sorted(STRATEGIES))}")
    return otherwise, (
        f"{strategy} was asked for; without input moments of {', '.join(missing)} it became {otherwise}",
    )


def _scale(strategy: str, scale: float | None, count: int) -> float:
    default = _strategy(strategy).scale
    if scale is None:
        return 1.0 if default is None else default(count)
    if default is None:
        raise ValueError(f"{strategy} has no scale; use the strategy 'scaled' for {scale:g} times the sum")
    if not 0 < scale < math.inf:
        raise ValueError(f"a scale is a positive number, got {scale}")
    return scale


def _cut(exact: Adapter, rank: int | None, energy: float | None) -> TruncatedAdapter:
    if energy is None:
        return TruncatedAdapter(exact, 0.0) if rank is None or rank >= exact.rank else recompress(exact, rank)
    cut = recompress(exact, energy=energy)
    limit = rank or RANK_CAP
    return cut if cut.adapter.rank <= limit else recompress(exact, limit)
