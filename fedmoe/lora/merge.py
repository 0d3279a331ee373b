"""K experts -> one adapter: weights are planned, checked, and then applied to the products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedmoe.lora.adapter import Adapter, ShapeError
from fedmoe.lora.algebra import recompress, stack


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged adapter with the weight of every source and what a rank cut lost (0 when nothing was cut)."""

    adapter: Adapter
    weights: Mapping[str, float]
    truncation_error: float


def _equal_weights(count: int) -> float:
    return 1.0 / count


def _unit_weights(count: int) -> float:
    return 1.0


#: Strategy name -> weight of each of `count` experts.
STRATEGIES: dict[str, Callable[[int], float]] = {"weighted_average": _equal_weights, "sum": _unit_weights}


def plan_weights(
    names: list[str], strategy: str = "weighted_average", given: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The weight of every expert, in name order.

    `given` weights are normalised for `weighted_average` and used as they are for `sum`.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; known: {', '.join(sorted(STRATEGIES))}")
    if not names:
        raise ValueError("there is no expert to merge yet; a worker has to register one first")
    ordered = sorted(names)
    if given is None:
        return dict.fromkeys(ordered, STRATEGIES[strategy](len(ordered)))
    return _given_weights(ordered, strategy, given)


def _given_weights(ordered: list[str], strategy: str, given: Mapping[str, float]) -> dict[str, float]:
    if set(given) != set(ordered):
        raise ValueError(f"weights name {sorted(given)}, the experts are {ordered}; name every expert once")
    total = sum(given[name] for name in ordered)  # in name order: rounding must not depend on the mapping's order
    if not all(given[name] >= 0 for name in ordered) or not 0 < total < math.inf:
        raise ValueError(f"weights and their sum must be finite, not negative and not all zero, got {dict(given)}")
    divisor = total if strategy == "weighted_average" else 1.0
    return {name: given[name] / divisor for name in ordered}


def merge(
    experts: Mapping[str, Adapter],
    strategy: str = "weighted_average",
    weights: Mapping[str, float] | None = None,
    rank: int | None = None,
) -> Merged:
    """Merge experts exactly in the product, sum_k w_k s_k B_k A_k; cut to `rank` only if asked.

    The order of `experts` does not matter: sources are taken in name order, so the bytes are the same.
    """
    planned = plan_weights(list(experts), strategy, weights)
    if rank is not None and rank < 1:
        raise ShapeError(f"the gateway's rank must be at least 1, got {rank}")
    exact = stack([(weight, experts[name]) for name, weight in planned.items()])
    if rank is None or rank >= exact.rank:
        return Merged(exact, planned, 0.0)
    cut = recompress(exact, rank)
    return Merged(cut.adapter, planned, cut.truncation_error)
