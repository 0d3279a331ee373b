"""Advantages: reward minus group mean (GRPO), or minus a moving average per task, role and policy.

Never one mean across policies or roles: in a game whose first mover wins more often, a shared mean rewards the seat.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BeforeValidator, FiniteFloat, PlainSerializer

Rewards = NDArray[np.float64]

# Added to a group's standard deviation (TRL's value), so that equal rewards give advantage 0 and not 0 / 0.
_STD_FLOOR = 1e-4


class BaselineError(ValueError):
    """Rewards or groups that cannot be used."""


def group_advantages(rewards: ArrayLike, groups: Sequence[int]) -> Rewards:
    """The advantage of each of N rewards over its group's mean, in sample standard deviations (GRPO), float64 (N,).

    A group of one has nothing to compare with and gets 0. Groups should hold one policy in one role only. Raises
    `BaselineError` for other lengths, or a reward that is not finite.
    """
    values = _finite(rewards)
    if len(groups) != len(values):
        raise BaselineError(f"every reward needs a group, got {len(values)} rewards and {len(groups)} groups")
    advantages = np.zeros_like(values)
    names = np.asarray(groups)
    for group in set(groups):
        members = names == group
        if members.sum() > 1:
            of_group = values[members]
            advantages[members] = (of_group - of_group.mean()) / (of_group.std(ddof=1) + _STD_FLOOR)
    return advantages


@dataclass(frozen=True, slots=True, order=True)
class BaselineKey:
    """The key of a baseline: a policy in a role (first mover, judge, ...) of a task."""

    task: str
    role: str
    policy: str


def _entries(values: dict[BaselineKey, float]) -> list[dict[str, object]]:
    return [{**asdict(key), "value": value} for key, value in sorted(values.items())]


def _by_key(saved: Any) -> dict[BaselineKey, object]:
    """From what `_entries` wrote; values are checked afterwards, as `MovingBaselines` declares them."""
    if not isinstance(saved, list) or not all(isinstance(entry, dict) for entry in saved):
        raise ValueError(f"expected a list of baselines, got {saved!r}")
    if wrong := [entry for entry in saved if set(entry) != {"task", "role", "policy", "value"}]:
        raise ValueError(f"a baseline has task, role, policy and value, got {wrong[0]!r}")
    return {BaselineKey(entry["task"], entry["role"], entry["policy"]): entry["value"] for entry in saved}


@dataclass
class MovingBaselines:
    """Exponential moving averages of rewards, one a key: role-conditioned advantage estimation (SPIRAL, 2506.24119).

    The advantage is taken over the value *before* the rewards at hand enter it, so no reward is compared with itself.
    `decay` in [0, 1) is what one reward leaves of the old value; `start` is the value of a key not seen before.
    """

    decay: FiniteFloat = 0.95
    start: FiniteFloat = 0.0
    baselines: Annotated[dict[BaselineKey, FiniteFloat], BeforeValidator(_by_key), PlainSerializer(_entries)] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1 or not math.isfinite(self.start):
            raise ValueError(f"decay must be in [0, 1) and start a finite number, got {self.decay} and {self.start}")

    def value(self, key: BaselineKey) -> float:
        """The baseline as it stands."""
        return self.baselines.get(key, self.start)

    def advantage(self, key: BaselineKey, rewards: ArrayLike) -> Rewards:
        """Rewards (N,) minus the baseline as it stands, float64 (N,); then the rewards enter the baseline.

        N rewards at once move it as far as N single ones, by their mean, so their order does not matter.
        """
        values = _finite(rewards)
        before = self.value(key)
        if len(values):
            remaining = self.decay ** len(values)
            self.baselines[key] = remaining * before + (1 - remaining) * float(values.mean())
        advantages: Rewards = values - before
        return advantages

    def reset(self) -> int:
        """Forget everything, since what was earned before a switch of mode says nothing about after; how many."""
        count = len(self.baselines)
        self.baselines.clear()
        return count


def _finite(rewards: ArrayLike) -> Rewards:
    values = np.asarray(rewards, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise BaselineError(f"rewards must be a flat list of finite numbers, got {rewards!r}")
    return values
