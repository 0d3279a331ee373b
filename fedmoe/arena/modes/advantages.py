"""What a reward is compared with: the mean of its group, or a moving average per task, role and policy.

Never one mean across policies or roles: in a game whose first mover wins more often, a shared mean rewards the seat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray

Rewards = NDArray[np.float64]
State = dict[str, float | list[dict[str, str | float]]]

# Added to a group's standard deviation (TRL's value), so that equal rewards give advantage 0 and not 0 / 0.
_STD_FLOOR = 1e-4


class BaselineError(ValueError):
    """Rewards, groups or a saved state that cannot be used."""


def _centred(rewards: Rewards) -> Rewards:
    advantages: Rewards = rewards - rewards.mean()
    return advantages


def _standardised(rewards: Rewards) -> Rewards:
    advantages: Rewards = _centred(rewards) / (rewards.std(ddof=1) + _STD_FLOOR)
    return advantages


def _leave_one_out(rewards: Rewards) -> Rewards:
    advantages: Rewards = _centred(rewards) * (len(rewards) / (len(rewards) - 1))
    return advantages


#: How a group compares its rewards: with its mean (Dr. GRPO), the mean in units of the sample standard deviation
#: (GRPO), or the mean of the *other* members (RLOO, unbiased).
GROUP_SCALES: Mapping[str, Callable[[Rewards], Rewards]] = MappingProxyType(
    {"mean": _centred, "std": _standardised, "leave_one_out": _leave_one_out}
)


def group_advantages(rewards: ArrayLike, groups: Sequence[int], scale: str = "std") -> Rewards:
    """The advantage of each of N rewards over its group, float64 (N,), by one of `GROUP_SCALES`.

    A group of one has nothing to compare with and gets 0. Groups should hold one policy in one role only. Raises
    `BaselineError` for an unknown scale, other lengths, or a reward that is not finite.
    """
    values = _finite(rewards)
    if scale not in GROUP_SCALES:
        raise BaselineError(f"scale {scale!r} is not known; there are: {', '.join(GROUP_SCALES)}")
    if len(groups) != len(values):
        raise BaselineError(f"every reward needs a group, got {len(values)} rewards and {len(groups)} groups")
    advantages = np.zeros_like(values)
    names = np.asarray(groups)
    for group in set(groups):
        members = names == group
        if members.sum() > 1:
            advantages[members] = GROUP_SCALES[scale](values[members])
    return advantages


@dataclass(frozen=True, slots=True, order=True)
class BaselineKey:
    """What has one baseline: a policy in a role (first mover, judge, ...) of a task."""

    task: str
    role: str
    policy: str


@dataclass(frozen=True, slots=True)
class BaselineReset:
    """That all baselines were forgotten, why, and how many there were."""

    reason: str
    forgotten: int


class MovingBaselines:
    """Exponential moving averages of rewards, one a key: role-conditioned advantage estimation (SPIRAL, 2506.24119).

    The advantage is taken over the value *before* the rewards at hand enter it, so no reward is compared with itself.
    `decay` in [0, 1) is what one reward leaves of the old value; `start` is the value of a key not seen before.
    """

    def __init__(self, decay: float = 0.95, start: float = 0.0) -> None:
        if not 0 <= decay < 1 or not math.isfinite(start):
            raise BaselineError(f"decay must be in [0, 1) and start a finite number, got {decay} and {start}")
        self._decay = decay
        self._start = start
        self._values: dict[BaselineKey, float] = {}

    def value(self, key: BaselineKey) -> float:
        """The baseline as it stands."""
        return self._values.get(key, self._start)

    def advantage(self, key: BaselineKey, rewards: ArrayLike) -> Rewards:
        """Rewards (N,) minus the baseline as it stands, float64 (N,); then the rewards enter the baseline.

        N rewards at once move it as far as N single ones, by their mean, so their order does not matter.
        """
        values = _finite(rewards)
        before = self.value(key)
        if len(values):
            kept = self._decay ** len(values)
            self._values[key] = kept * before + (1 - kept) * float(values.mean())
        advantages: Rewards = values - before
        return advantages

    def reset(self, reason: str) -> BaselineReset:
        """Forget everything, as a switch of mode demands: what was earned before says nothing about after."""
        if not reason:
            raise BaselineError("a reset needs a reason, got an empty one")
        done = BaselineReset(reason, len(self._values))
        self._values.clear()
        return done

    def state(self) -> State:
        """Everything, as plain JSON."""
        entries: list[dict[str, str | float]] = [
            {"task": key.task, "role": key.role, "policy": key.policy, "value": value}
            for key, value in sorted(self._values.items())
        ]
        return {"decay": self._decay, "start": self._start, "baselines": entries}

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> MovingBaselines:
        """What `state` was taken of; raises `BaselineError` for anything else."""
        entries = state.get("baselines")
        if set(state) != {"decay", "start", "baselines"} or not isinstance(entries, list):
            raise BaselineError(f"expected decay, start and a list of baselines, got the keys {sorted(state)}")
        restored = cls(_number(state["decay"]), _number(state["start"]))
        for entry in entries:
            if not isinstance(entry, dict) or set(entry) != {"task", "role", "policy", "value"}:
                raise BaselineError(f"a baseline has task, role, policy and value, got {entry!r}")
            key = BaselineKey(str(entry["task"]), str(entry["role"]), str(entry["policy"]))
            restored._values[key] = _number(entry["value"])
        return restored


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BaselineError(f"expected a finite number, got {value!r}")
    return float(value)


def _finite(rewards: ArrayLike) -> Rewards:
    values = np.asarray(rewards, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all():
        raise BaselineError(f"rewards must be a flat list of finite numbers, got {rewards!r}")
    return values
