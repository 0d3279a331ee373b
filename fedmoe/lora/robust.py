"""What an update must satisfy before it may touch an expert."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from fedmoe.lora.adapter import FloatVector, Layout


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
