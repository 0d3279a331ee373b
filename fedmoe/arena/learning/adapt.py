"""Learning rate, scale and rank follow the effect of training: rate first, rank last, every change with its reason.

The effect is a reward that can rise: a score against frozen opponents or on held-out episodes, not self-play's, which
is 0 on the mean however well or badly both sides play.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from fedmoe.arena.learning.loss import gap_alarm
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.resize import grow_rank, rescale

What = Literal["learning_rate", "alpha", "rank"]

# Lowering is for safety and halves; raising is a trial and is more careful where it can be (a rank doubles).
_LOWER = 0.5
_RAISE_RATE = 1.5
_RAISE = 2


class AdaptError(ValueError):
    """Rules, effects or a saved state that cannot be used."""


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
    kl_high: float = 0.02
    patience: int = 20
    min_gain: float = 0.01
    max_drop: float = 0.1
    ceiling: float = 0.98
    cooldown: int = 10
    fast: float = 0.7
    slow: float = 0.95

    def __post_init__(self) -> None:
        for low, high in (("min_rate", "max_rate"), ("min_scale", "max_scale"), ("kl_low", "kl_high")):
            least, most = getattr(self, low), getattr(self, high)
            if not 0 < least <= most < math.inf:
                raise AdaptError(f"{low} and {high} are positive and in this order, got {least} and {most}")
        if self.max_rank < 1 or self.patience < 1 or self.cooldown < 0:
            raise AdaptError(
                "max_rank and patience start at 1, cooldown at 0, "
                f"got {self.max_rank}, {self.patience} and {self.cooldown}"
            )
        if not (self.min_gain > 0 and self.max_drop > 0 and 0 <= self.fast < self.slow < 1):
            raise AdaptError(
                "min_gain and max_drop are positive and 0 <= fast < slow < 1, got "
                f"{self.min_gain}, {self.max_drop}, {self.fast} and {self.slow}"
            )


@dataclass(frozen=True, slots=True)
class Knobs:
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


@dataclass(frozen=True, slots=True)
class Effect:
    """What one update did: the reward after it, and per token the KL (nats) it moved by and the gap to the rollout."""

    reward: float
    kl: float
    gap: float


@dataclass(frozen=True, slots=True)
class Change:
    """One change, to be logged: after which effect, what, from where to where, and why."""

    effect: int
    what: What
    before: float
    after: float
    reason: str


@dataclass(frozen=True, slots=True)
class AdaptiveLora:
    """The state machine of one policy: a value; `observe` gives the next one and the change it decided on, if any.

    Lowered (rate, then scale): when the gap alarm sounds, an update moves too far, or the reward falls. Raised when
    the reward stands still below the ceiling: the rate if updates move too little, else the scale, at last the rank.
    """

    rules: AdaptRules
    knobs: Knobs
    effects: int = 0
    fast: float = 0.0
    slow: float = 0.0
    best: float = 0.0
    waited: int = 0
    resting: int = 0

    def observe(self, effect: Effect) -> tuple[AdaptiveLora, Change | None]:
        """Take in one effect; at most one change at a time. Raises `AdaptError` for a reward that is not finite."""
        seen = self._seen(effect)
        wanted = None if seen.resting else seen._wanted(effect)
        if wanted is None:
            return replace(seen, resting=max(seen.resting - 1, 0)), None
        knobs, what, reason = wanted
        change = Change(seen.effects, what, getattr(self.knobs, what), getattr(knobs, what), reason)
        # The new setting is judged by what comes after it, not by the best moment before.
        return replace(seen, knobs=knobs, best=seen.fast, waited=0, resting=self.rules.cooldown), change

    def state(self) -> dict[str, float | int | dict[str, float | int]]:
        """Everything but the rules, as plain JSON."""
        return {"knobs": asdict(self.knobs)} | {name: getattr(self, name) for name in _COUNTS}

    @classmethod
    def from_state(cls, rules: AdaptRules, state: Mapping[str, object]) -> AdaptiveLora:
        """What `state` was taken of, under rules that may have changed; raises `AdaptError` for anything else."""
        knobs = state.get("knobs")
        if set(state) != {"knobs", *_COUNTS} or not isinstance(knobs, dict) or set(knobs) != _KNOBS:
            raise AdaptError(f"expected knobs ({', '.join(sorted(_KNOBS))}) and {', '.join(_COUNTS)}, got {state!r}")
        rate, alpha, rank = (_number(knobs[name]) for name in ("learning_rate", "alpha", "rank"))
        effects, fast, slow, best, waited, resting = (_number(state[name]) for name in _COUNTS)
        return cls(rules, Knobs(rate, alpha, int(rank)), int(effects), fast, slow, best, int(waited), int(resting))

    def _seen(self, effect: Effect) -> AdaptiveLora:
        reward = effect.reward
        if not math.isfinite(reward):
            raise AdaptError(f"the reward must be a finite number, got {reward}")
        if not self.effects:
            return replace(self, effects=1, fast=reward, slow=reward, best=reward)
        fast = self.rules.fast * self.fast + (1 - self.rules.fast) * reward
        slow = self.rules.slow * self.slow + (1 - self.rules.slow) * reward
        gained = fast >= self.best + self.rules.min_gain
        return replace(
            self,
            effects=self.effects + 1,
            fast=fast,
            slow=slow,
            best=fast if gained else self.best,
            waited=0 if gained else self.waited + 1,
        )

    def _wanted(self, effect: Effect) -> tuple[Knobs, What, str] | None:
        rules = self.rules
        alarm = gap_alarm(effect.gap)
        if alarm:
            return self._lowered(alarm)
        if not effect.kl <= rules.kl_high:
            return self._lowered(f"an update moves the policy by {effect.kl:.3g} nats per token, above {rules.kl_high}")
        if self.fast < self.slow - rules.max_drop:
            return self._lowered(f"the reward falls: {self.fast:.3g} lately, {self.slow:.3g} in the long run")
        if self.waited >= rules.patience and self.fast < rules.ceiling:
            return self._raised(effect.kl)
        return None

    def _lowered(self, reason: str) -> tuple[Knobs, What, str] | None:
        knobs, rules = self.knobs, self.rules
        if knobs.learning_rate > rules.min_rate:
            rate = max(knobs.learning_rate * _LOWER, rules.min_rate)
            return replace(knobs, learning_rate=rate), "learning_rate", reason
        if knobs.scale > rules.min_scale:
            scale = max(knobs.scale * _LOWER, rules.min_scale)
            reason = f"{reason}; the learning rate is at its minimum"
            return replace(knobs, alpha=scale * knobs.rank), "alpha", reason
        return None

    def _raised(self, kl: float) -> tuple[Knobs, What, str] | None:
        knobs, rules = self.knobs, self.rules
        reason = f"no gain of {rules.min_gain} over the reward {self.best:.3g} for {self.waited} effects"
        too_little = kl < rules.kl_low
        if too_little and knobs.learning_rate < rules.max_rate:
            rate = min(knobs.learning_rate * _RAISE_RATE, rules.max_rate)
            reason = f"{reason}; an update moves the policy by {kl:.3g} nats per token only"
            return replace(knobs, learning_rate=rate), "learning_rate", reason
        held = "the learning rate is at its maximum" if too_little else "updates are large enough"
        if knobs.scale < rules.max_scale:
            scale = min(knobs.scale * _RAISE, rules.max_scale)
            return replace(knobs, alpha=scale * knobs.rank), "alpha", f"{reason}; {held}"
        if knobs.rank < rules.max_rank:
            rank = min(knobs.rank * _RAISE, rules.max_rank)
            reason = f"{reason}; {held} and the scale at its maximum"
            return replace(knobs, rank=rank, alpha=knobs.alpha * rank / knobs.rank), "rank", reason
        return None


_COUNTS = ("effects", "fast", "slow", "best", "waited", "resting")
_KNOBS = {field.name for field in fields(Knobs)}


def fitted(adapter: Adapter, knobs: Knobs, seed: int) -> Adapter:
    """The adapter at the rank and alpha of `knobs`, computing the same function; `seed` draws new rows of A.

    Raises `ShapeError` if the rank would shrink.
    """
    grown = adapter if adapter.rank == knobs.rank else grow_rank(adapter, knobs.rank, seed)
    return grown if grown.alpha == knobs.alpha else rescale(grown, knobs.alpha)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise AdaptError(f"expected a finite number, got {value!r}")
    return value
