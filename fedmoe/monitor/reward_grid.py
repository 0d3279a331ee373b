"""The grid policy x iterations x reward that heat maps and surfaces are drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedmoe.lora.adapter import Float64Array
from fedmoe.monitor.arena_series import ArenaSeries


@dataclass(frozen=True, slots=True)
class RewardGrid:
    """Mean rewards: `values` (policies, b), NaN where a policy has none; `starts`, `lengths` (b,) in iterations.

    Policies stand by rising recent reward, so that low ones in front hide nothing. `width` is the length of every
    stretch: 1 shows each iteration by itself.
    """

    policies: tuple[str, ...]
    starts: Float64Array
    lengths: Float64Array
    values: Float64Array
    width: float


def reward_grid(series: ArenaSeries, bins: int) -> RewardGrid:
    """Rewards of all policies that have any, in at most `bins` stretches of equally many iterations."""
    points = {policy: table.points("reward") for policy, table in series.tables.items()}
    there = (policy for policy in series.policies if len(points[policy][0]))
    policies = tuple(sorted(there, key=lambda policy: series.tables[policy].recent("reward")))
    if not policies:
        empty = np.empty(0)
        return RewardGrid((), empty, empty, np.empty((0, 0)), 1.0)
    first = min(float(points[policy][0][0]) for policy in policies)
    last = max(float(points[policy][0][-1]) for policy in policies)
    width = float(math.ceil((last - first + 1) / bins))
    count = int((last - first) // width) + 1
    starts = first - 0.5 + width * np.arange(count, dtype=np.float64)
    values = np.stack([_means(*points[policy], starts, width) for policy in policies])
    # The last stretch ends where the run ends.
    lengths = np.minimum(width, last + 0.5 - starts)
    return RewardGrid(policies, starts, lengths, values, width)


def _means(x: Float64Array, y: Float64Array, starts: Float64Array, width: float) -> Float64Array:
    place = ((x - starts[0]) // width).astype(np.int64)
    counts = np.bincount(place, minlength=len(starts))
    sums = np.bincount(place, weights=y, minlength=len(starts))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
