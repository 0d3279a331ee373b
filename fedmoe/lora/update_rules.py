"""Update rules: staleness functions, and server optimizers as pure functions.

A staleness function maps tau (versions the expert moved on since the worker downloaded it) to a weight in [0, 1];
a fresh update (tau = 0) always weighs exactly 1. A rule applies one weighted delta to the expert's state. All
arithmetic is elementwise float32 in a fixed order, so a replay of the same updates gives the same bits.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedmoe.lora.adapter import FloatVector, Layout, ShapeError

# Elements handled at once: small enough to stay in the cache between the multiply and the add.
_CHUNK = 1 << 16


def constant(tau: int) -> float:
    """s = 1 whatever the staleness."""
    return 1.0


def polynomial(tau: int, exponent: float = 0.5) -> float:
    """s = (1 + tau)^-a (Xie et al. 2019, FedAsync)."""
    return float((1.0 + tau) ** -exponent)


def hinge(tau: int, slope: float = 10.0, free: int = 4) -> float:
    """s = 1 up to `free` versions, then 1 / (slope * (tau - free) + 1) (Xie et al. 2019, FedAsync)."""
    return 1.0 if tau <= free else 1.0 / (slope * (tau - free) + 1.0)


def exponential(tau: int, rate: float = 0.1) -> float:
    """s = e^(-rate * tau)."""
    return math.exp(-rate * tau)


#: Staleness function name -> function of tau.
STALENESS: dict[str, Callable[[int], float]] = {
    "constant": constant,
    "polynomial": polynomial,
    "hinge": hinge,
    "exponential": exponential,
}


@dataclass(frozen=True)
class RuleState:
    """An expert's weights with what its rule remembers: `moments` are vectors like `weights`, `count` of updates."""

    weights: FloatVector
    moments: tuple[FloatVector, ...] = ()
    count: int = 0


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """A server optimizer: how many moment vectors it keeps, and how one delta with its coefficient is applied."""

    name: str
    moments: int
    update: Callable[[RuleState, FloatVector, float], RuleState]

    def init(self, weights: FloatVector) -> RuleState:
        # Not `zeros_like`: memory that was never written to costs nothing.
        return RuleState(weights, tuple(np.zeros(weights.shape, weights.dtype) for _ in range(self.moments)))


def add_scaled(weights: FloatVector, delta: FloatVector, coefficient: float) -> FloatVector:
    """A new vector `weights + coefficient * delta` in float32, chunk by chunk so that both passes hit the cache.

    Raises `ShapeError` if the two differ in shape.
    """
    if weights.shape != delta.shape:
        raise ShapeError(f"a delta of shape {delta.shape} cannot be added to weights of shape {weights.shape}")
    result = np.empty_like(weights)
    factor = np.float32(coefficient)
    scratch = np.empty(min(_CHUNK, weights.size), np.float32)
    for start in range(0, weights.size, _CHUNK):
        part = slice(start, min(start + _CHUNK, weights.size))
        term = scratch[: part.stop - start]
        np.multiply(delta[part], factor, out=term)
        np.add(weights[part], term, out=result[part])
    return result


def _sgd(state: RuleState, delta: FloatVector, coefficient: float) -> RuleState:
    return replace(state, weights=add_scaled(state.weights, delta, coefficient), count=state.count + 1)


def _nesterov(state: RuleState, delta: FloatVector, coefficient: float, momentum: float = 0.9) -> RuleState:
    weighted = np.multiply(delta, np.float32(coefficient))
    velocity = add_scaled(weighted, state.moments[0], momentum)
    step = add_scaled(weighted, velocity, momentum)
    # (1 - momentum) keeps the long-run step the size of plain SGD's, so one learning rate serves both rules.
    weights = add_scaled(state.weights, step, 1.0 - momentum)
    return RuleState(weights, (velocity,), state.count + 1)


def _adam(state: RuleState, delta: FloatVector, coefficient: float) -> RuleState:
    beta1, beta2, rate = 0.9, 0.99, 1e-3
    count = state.count + 1
    weighted = np.multiply(delta, np.float32(coefficient))
    first = add_scaled(np.multiply(state.moments[0], np.float32(beta1)), weighted, 1.0 - beta1)
    second = add_scaled(np.multiply(state.moments[1], np.float32(beta2)), np.square(weighted), 1.0 - beta2)
    root = np.sqrt(np.divide(second, np.float32(1.0 - beta2**count)))
    step = np.divide(first, (root + np.float32(rate)) * np.float32(1.0 - beta1**count)).astype(np.float32, copy=False)
    return RuleState(add_scaled(state.weights, step, rate), (first, second), count)


def buffered(rule: UpdateRule, size: int) -> UpdateRule:
    """The rule fed with the mean of `size` weighted deltas at a time (FedBuff, Nguyen et al. 2022).

    The weights stand still until a buffer is full; what is gathered so far is the last moment of the state.
    """
    if size < 1:
        raise ValueError(f"a buffer holds at least 1 update, got {size}")
    if size == 1:
        return rule

    def update(state: RuleState, delta: FloatVector, coefficient: float) -> RuleState:
        *moments, gathered = state.moments
        gathered, count = add_scaled(gathered, delta, coefficient), state.count + 1
        if count % size:
            return RuleState(state.weights, (*moments, gathered), count)
        before = RuleState(state.weights, tuple(moments), state.count // size)
        after = rule.update(before, gathered, 1.0 / size)
        return RuleState(after.weights, (*after.moments, np.zeros_like(gathered)), count)

    return UpdateRule(f"{rule.name}, buffer of {size}", rule.moments + 1, update)


#: Rule name -> rule. `sgd` is the specified one, `expert += lr * s(tau) * delta`; `nesterov` is DiLoCo's outer
#: optimizer (Douillard et al. 2023); `adam` is FedAdam (Reddi et al. 2021) with bias correction and eta = tau = 1e-3: a
#: number that moves much less than 1e-3 moves as it does under `sgd` on average, one that moves more at most 1e-3.
RULES: dict[str, UpdateRule] = {
    "sgd": UpdateRule("sgd", 0, _sgd),
    "nesterov": UpdateRule("nesterov", 1, _nesterov),
    "adam": UpdateRule("adam", 2, _adam),
}


def first_not_finite(layout: Layout, flat: FloatVector) -> str | None:
    """The name of the first factor that holds a NaN or an infinity; None if all is finite.

    One dot product decides the usual case: it is finite only if every number is. Where it overflows, each factor
    is looked at, so large but finite numbers pass.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(flat, flat)):
            return None
    for module, a, b in layout.factors(flat):
        for factor, values in (("lora_A", a), ("lora_B", b)):
            if not np.isfinite(values).all():
                return f"{module.name}.{factor}"
    return None


#: How many of the last norms say what is usual, and how many are needed before anything is called unusual.
USUAL_WINDOW = 32
USUAL_LEAST = 5


def usual_norm(recent: Sequence[float]) -> float | None:
    """The median of the recent norms; None while fewer than `USUAL_LEAST` are known."""
    return statistics.median(recent) if len(recent) >= USUAL_LEAST else None


def clip_factor(norm: float, recent: Sequence[float], multiple: float) -> float:
    """What to multiply an update with so that its norm is at most `multiple` times the median of the recent ones.

    1 while fewer than `USUAL_LEAST` norms are known. Norm clipping bounds what one update can do; it is no defence
    against many small ones (Shejwalkar et al. 2022).
    """
    usual = usual_norm(recent)
    return 1.0 if usual is None or norm <= 0 else min(1.0, multiple * usual / norm)


def times_usual(norm: float, recent: Sequence[float]) -> float | None:
    """How many times the median of the recent norms this one is; None while nothing is known to be usual."""
    usual = usual_norm(recent)
    return norm / usual if usual else None
