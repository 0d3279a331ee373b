"""Adaptation of a policy's learning rate, scale and rank to the effect of training, each change with its reason.

The effect is a reward that can rise: a score against frozen opponents or on held-out episodes, not self-play's, which
is 0 on the mean however well or badly both sides play.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fedmoe.arena.learning.loss import gap_alarm
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.resize import grow_rank, rescale

# Lowering is for safety and halves; raising is a trial and is more careful where it can be (a rank doubles).
_LOWER = 0.5
_RAISE_RATE = 1.5
_RAISE = 2


class AdaptError(ValueError):
    """Settings or effects that cannot be used."""


@dataclass(frozen=True, slots=True)
class AdaptRules:
    """When to change what, and how far.

    The learning rate stays in [`min_rate`, `max_rate`], alpha / rank in [`min_scale`, `max_scale`], the rank at most
    `max_rank` (what the rollout server was started for). `kl_low`, `kl_high`: nats per token by which an update should
    move the policy. `patience`: effects without a gain of `min_gain` before something is raised; `max_drop`: how far
    the fast average of the reward may fall below the slow one; `ceiling`: the reward that leaves nothing to learn;
    `cooldown`: effects to wait for after a change. `fast`, `slow`: what one effect leaves of each average.
    """

    min_rate: float = 1e-6
    max_rate: float = 1e-3
    min_scale: float = 0.5
    max_scale: float = 8.0
    max_rank: int = 64
    kl_low: float = 1e-4
    #: Short answers of a small model learn well at 0.05 to 0.15, and a rate halved for less hardly recovers, measured.
    kl_high: float = 0.25
    patience: int = 20
    min_gain: float = 0.01
    #: An iteration's few problems differ by about 0.1 in how hard they are.
    max_drop: float = 0.3
    ceiling: float = 0.98
    cooldown: int = 10
    fast: float = 0.7
    slow: float = 0.95


@dataclass(frozen=True, slots=True)
class TuningParameters:
    """What is adapted; the scale of the product is alpha / rank."""

    learning_rate: float
    alpha: float
    rank: int

    def __post_init__(self) -> None:
        if not (0 < self.learning_rate < math.inf and 0 < self.alpha < math.inf and self.rank >= 1):
            raise AdaptError(f"learning rate, alpha and rank must be positive numbers, got {self}")

    @property
    def scale(self) -> float:
        """The factor in front of the product."""
        return self.alpha / self.rank

    def changed(self, change: TuningChange) -> TuningParameters:
        """The knobs after a change; the scale stays where the rank grows."""
        if change.what == "learning_rate":
            return replace(self, learning_rate=change.after)
        if change.what == "alpha":
            return replace(self, alpha=change.after)
        rank = int(change.after)
        return replace(self, rank=rank, alpha=self.alpha * rank / self.rank)


@dataclass(frozen=True, slots=True)
class UpdateEffect:
    """What one update did: the reward after it, and per token the KL (nats) it moved by and the gap to the rollout."""

    reward: float
    kl: float
    gap: float


@dataclass(frozen=True, slots=True)
class TuningChange:
    """One change, to be logged: after which effect, what, from where to where, and why."""

    effect: int
    what: Literal["learning_rate", "alpha", "rank"]
    before: float
    after: float
    reason: str


@dataclass(frozen=True, slots=True)
class AdaptiveLora:
    """The state machine of one policy: a value; `observe` gives the next one and the change it decided on, if any.

    Lowered (rate, then scale): when the gap alarm sounds, an update moves too far, or the reward falls. Raised when
    the reward stands still below the ceiling: the rate if updates move too little, else the scale, at last the rank.
    """

    knobs: TuningParameters
    effects: int = 0
    fast: float = 0.0
    slow: float = 0.0
    best: float = 0.0
    waited: int = 0
    resting: int = 0

    def observe(self, effect: UpdateEffect, rules: AdaptRules) -> tuple[AdaptiveLora, TuningChange | None]:
        """Take in one effect; at most one change at a time. Raises `AdaptError` for a reward that is not finite."""
        after = self._averaged(effect.reward, rules)
        change = None if after.resting else after._next_change(effect, rules)
        if change is None:
            return replace(after, resting=max(after.resting - 1, 0)), None
        # The new setting is judged by what comes after it, not by the best moment before.
        knobs = self.knobs.changed(change)
        return replace(after, knobs=knobs, best=after.fast, waited=0, resting=rules.cooldown), change

    def _averaged(self, reward: float, rules: AdaptRules) -> AdaptiveLora:
        if not math.isfinite(reward):
            raise AdaptError(f"the reward must be a finite number, got {reward}")
        if not self.effects:
            return replace(self, effects=1, fast=reward, slow=reward, best=reward)
        fast = rules.fast * self.fast + (1 - rules.fast) * reward
        slow = rules.slow * self.slow + (1 - rules.slow) * reward
        gained = fast >= self.best + rules.min_gain
        best, waited = (fast, 0) if gained else (self.best, self.waited + 1)
        return replace(self, effects=self.effects + 1, fast=fast, slow=slow, best=best, waited=waited)

    def _next_change(self, effect: UpdateEffect, rules: AdaptRules) -> TuningChange | None:
        alarm = gap_alarm(effect.gap)
        if alarm:
            return self._lowered(rules, alarm)
        if not effect.kl <= rules.kl_high:
            reason = f"an update moves the policy by {effect.kl:.3g} nats per token, above {rules.kl_high}"
            return self._lowered(rules, reason)
        if self.fast < self.slow - rules.max_drop:
            reason = f"the reward falls: {self.fast:.3g} lately, {self.slow:.3g} in the long run"
            return self._lowered(rules, reason)
        if self.waited >= rules.patience and self.fast < rules.ceiling:
            return self._raised(rules, effect.kl)
        return None

    def _lowered(self, rules: AdaptRules, reason: str) -> TuningChange | None:
        knobs = self.knobs
        if knobs.learning_rate > rules.min_rate:
            rate = max(knobs.learning_rate * _LOWER, rules.min_rate)
            return TuningChange(self.effects, "learning_rate", knobs.learning_rate, rate, reason)
        if knobs.scale > rules.min_scale:
            alpha = max(knobs.scale * _LOWER, rules.min_scale) * knobs.rank
            reason = f"{reason}; the learning rate is at its minimum"
            return TuningChange(self.effects, "alpha", knobs.alpha, alpha, reason)
        return None

    def _raised(self, rules: AdaptRules, kl: float) -> TuningChange | None:
        knobs = self.knobs
        reason = f"no gain of {rules.min_gain} over the reward {self.best:.3g} for {self.waited} effects"
        too_little = kl < rules.kl_low
        if too_little and knobs.learning_rate < rules.max_rate:
            rate = min(knobs.learning_rate * _RAISE_RATE, rules.max_rate)
            reason = f"{reason}; an update moves the policy by {kl:.3g} nats per token only"
            return TuningChange(self.effects, "learning_rate", knobs.learning_rate, rate, reason)
        held = "the learning rate is at its maximum" if too_little else "updates are large enough"
        if knobs.scale < rules.max_scale:
            alpha = min(knobs.scale * _RAISE, rules.max_scale) * knobs.rank
            return TuningChange(self.effects, "alpha", knobs.alpha, alpha, f"{reason}; {held}")
        if knobs.rank < rules.max_rank:
            rank = min(knobs.rank * _RAISE, rules.max_rank)
            return TuningChange(
                self.effects, "rank", knobs.rank, rank, f"{reason}; {held} and the scale at its maximum"
            )
        return None


def fitted(adapter: Adapter, knobs: TuningParameters, seed: int) -> Adapter:
    """The adapter at the rank and alpha of `knobs`, computing the same function; `seed` draws new rows of A.

    Raises `ShapeError` if the rank would shrink.
    """
    grown = adapter if adapter.rank == knobs.rank else grow_rank(adapter, knobs.rank, seed)
    return grown if grown.alpha == knobs.alpha else rescale(grown, knobs.alpha)
