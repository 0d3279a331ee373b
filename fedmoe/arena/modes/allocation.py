"""Neyman allocation: divides a fixed number of episodes in proportion to the standard deviation of their rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


def allocate(total: int, deviations: Mapping[str, float], floor: int = 1) -> dict[str, int]:
    """Divide `total` groups of episodes among the keys in proportion to their standard deviations, at least `floor`.

    Neyman allocation (1934): n_k proportional to sigma_k makes the summed variance of the means, the sum of
    sigma_k^2 / n_k, least for a given sum of n_k. Keys below the floor get the floor and the others share what is
    left. Whole numbers by largest remainder; they add up to `total` exactly. Where all deviations are zero every key
    gets the same, up to one. Raises ValueError when the floor alone needs more than `total`.
    """
    if not deviations or floor < 0 or total < floor * len(deviations):
        raise ValueError(f"{total} groups cannot give each of {len(deviations)} keys at least {floor}")
    if any(not (math.isfinite(value) and value >= 0) for value in deviations.values()):
        raise ValueError(f"standard deviations are finite and at least 0, got {dict(deviations)}")
    shares = _shares(total, deviations, floor)
    counts = {key: math.floor(share + 1e-9) for key, share in shares.items()}
    missing = total - sum(counts.values())
    # Largest remainder; equal ones in order of their names.
    for key in sorted(shares, key=lambda key: (counts[key] - shares[key], key))[:missing]:
        counts[key] += 1
    return counts


def _shares(total: int, deviations: Mapping[str, float], floor: int) -> dict[str, float]:
    """The real-valued optimum under the floor: fix who falls below it, divide the rest again, until none does."""
    shares: dict[str, float] = {}
    open_keys = dict(deviations)
    while open_keys:
        spare = total - floor * len(shares)
        largest = max(open_keys.values())
        # Relative to the largest: sums of denormal or huge deviations neither vanish nor overflow.
        relative = {key: value / largest if largest > 0 else 1.0 for key, value in open_keys.items()}
        scale = spare / sum(relative.values())
        below = [key for key, value in relative.items() if value * scale < floor]
        if not below:
            return shares | {key: value * scale for key, value in relative.items()}
        for key in below:
            shares[key] = float(floor)
            del open_keys[key]
    return shares


@dataclass(frozen=True, slots=True)
class GroupVariance:
    """The mean variance within the groups of a key, and how many groups it counts as."""

    variance: float
    weight: float


@dataclass
class LearningSignal:
    """How much the groups of each key (a policy, a kind of problem) still teach: their standard deviation within.

    Advantages compare the episodes of one group, so a group with equal rewards teaches nothing, and the variance
    within groups is what a policy gradient has to go by. Values may be rewards or marginal contributions (what the
    team loses without the policy). Old groups fade by `memory` per group of the key. `prior` is the deviation that
    is assumed before the first group, worth one group: the most that values in [0, 1] can have, so that what is new
    is tried.
    """

    memory: float = 0.9
    prior: float = 0.5
    seen: dict[str, GroupVariance] = field(default_factory=dict)

    def observe(self, key: str, values: Sequence[float]) -> None:
        """Take the values of one group of at least two episodes; raises ValueError for fewer, or for NaN."""
        if len(values) < 2 or not all(math.isfinite(value) for value in values):
            raise ValueError(f"a group has two or more finite values, got {list(values)} for {key!r}")
        before = self.seen.get(key, GroupVariance(self.prior**2, 1.0))
        weight = self.memory * before.weight + 1.0
        variance = float(np.var(np.asarray(values, np.float64)))
        self.seen[key] = GroupVariance(before.variance + (variance - before.variance) / weight, weight)

    def deviations(self, keys: Sequence[str]) -> dict[str, float]:
        """The standard deviation within groups of each key, in the unit of its values, as `allocate` takes it."""
        return {key: math.sqrt(self.seen[key].variance) if key in self.seen else self.prior for key in keys}
