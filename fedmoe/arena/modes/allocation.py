"""Where episodes help most: a fixed number of them, divided by how much there is to learn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypedDict, cast

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
    return _whole(_shares(total, deviations, floor), total)


def _shares(total: int, deviations: Mapping[str, float], floor: int) -> dict[str, float]:
    """The real-valued optimum under the floor: fix who falls below it, divide the rest again, until nobody does."""
    shares: dict[str, float] = {}
    open_keys = dict(deviations)
    while open_keys:
        left = total - floor * len(shares)
        largest = max(open_keys.values())
        # Relative to the largest: sums of denormal or huge deviations neither vanish nor overflow.
        relative = {key: value / largest if largest > 0 else 1.0 for key, value in open_keys.items()}
        scale = left / sum(relative.values())
        below = [key for key, value in relative.items() if value * scale < floor]
        if not below:
            return shares | {key: value * scale for key, value in relative.items()}
        for key in below:
            shares[key] = float(floor)
            del open_keys[key]
    return shares


def _whole(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Largest remainder: round down, then one more for the largest fractions; equal ones in order of their names."""
    counts = {key: math.floor(share + 1e-9) for key, share in shares.items()}
    missing = total - sum(counts.values())
    by_remainder = sorted(shares, key=lambda key: (counts[key] - shares[key], key))
    for key in by_remainder[:missing]:
        counts[key] += 1
    return counts


class _SignalState(TypedDict):
    memory: float
    prior: float
    seen: dict[str, _SeenState]


class _SeenState(TypedDict):
    variance: float
    weight: float


@dataclass(frozen=True, slots=True)
class _Seen:
    variance: float = 0.0
    weight: float = 0.0


class LearningSignal:
    """How much the groups of each key (a policy, a kind of problem) still teach: their standard deviation within.

    Advantages compare the episodes of one group, so a group with equal rewards teaches nothing, and the variance
    within groups is what a policy gradient has to go by. Values may be rewards or marginal contributions (what the
    team loses without the policy). Old groups fade by `memory` per group of the key. `prior` is the deviation that
    is assumed before the first group, worth one group: the most that values in [0, 1] can have, so that what is new
    is tried.
    """

    def __init__(self, memory: float = 0.9, prior: float = 0.5) -> None:
        if not (0 <= memory < 1 and prior > 0):
            raise ValueError(f"memory lies in [0, 1) and prior is positive, got {memory} and {prior}")
        self._memory = memory
        self._prior = prior
        self._seen: dict[str, _Seen] = {}

    def observe(self, key: str, values: Sequence[float]) -> None:
        """Take the values of one group of at least two episodes; raises ValueError for fewer, or for NaN."""
        if len(values) < 2 or not all(math.isfinite(value) for value in values):
            raise ValueError(f"a group has two or more finite values, got {list(values)} for {key!r}")
        seen = self._seen.get(key, _Seen(self._prior**2, 1.0))
        weight = self._memory * seen.weight + 1.0
        variance = float(np.var(np.asarray(values, np.float64)))
        self._seen[key] = _Seen(seen.variance + (variance - seen.variance) / weight, weight)

    def deviation(self, key: str) -> float:
        """The standard deviation within groups of `key`, in the unit of its values."""
        return math.sqrt(self._seen[key].variance) if key in self._seen else self._prior

    def deviations(self, keys: Sequence[str]) -> dict[str, float]:
        """The same for several keys, as `allocate` takes it."""
        return {key: self.deviation(key) for key in keys}

    def forget(self, key: str) -> None:
        """Begin a key anew (its policy was replaced); nothing happens for one never seen."""
        self._seen.pop(key, None)

    def state(self) -> dict[str, object]:
        """JSON types only; `from_state` gives an equal signal back."""
        seen = {key: {"variance": known.variance, "weight": known.weight} for key, known in self._seen.items()}
        return {"memory": self._memory, "prior": self._prior, "seen": seen}

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> Self:
        """The signal that `state` wrote."""
        fields = cast(_SignalState, state)
        signal = cls(fields["memory"], fields["prior"])
        signal._seen = {key: _Seen(**known) for key, known in fields["seen"].items()}
        return signal
