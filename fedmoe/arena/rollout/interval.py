"""Confidence intervals of means over held-out episodes, clustered by question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

#: Fewer different questions than this say little of others: whoever shows a comparison warns.
FEW_QUESTIONS = 50
_QUANTILE = 1.959963984540054
_MISS = 0.025
_SMALL_T = {1: 12.706204736432095, 2: 4.302652729696142, 3: 3.182446305284263}


@dataclass(frozen=True, slots=True)
class MeanInterval:
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Scores, questions: Sequence[object], bounds: tuple[float, float] = (0.0, 1.0)) -> MeanInterval:
        """The mean of `values` (n,), every one within `bounds`; `questions` (n,) says which belong together.

        The mean weighs episodes alike: they are drawn as questions come, so it is unbiased for these. Its variance is
        that of the delete-one-question jackknife with Student's t of questions - 1 degrees of freedom (MacKinnon,
        Nielsen and Webb, J. Econometrics 232, 2023, CV3; the percentile bootstrap is too narrow with few clusters,
        Cameron, Gelbach and Miller, REStat 90, 2008). Where all values stand at one end of the bounds, the width is
        the binomial one (Clopper and Pearson 1934). With a single question it spans the bounds.

        Raises ValueError for no values, or as many questions as there are not.
        """
        if not len(values) or len(values) != len(questions):
            raise ValueError(f"each episode needs a value and its question, got {len(values)} and {len(questions)}")
        mean = float(values.mean())
        names, which = np.unique(np.array(list(map(str, questions))), return_inverse=True)
        count = len(names)
        if values.min() == values.max():
            return _constant(float(values[0]), count, bounds)
        if count == 1:
            return cls(mean, *bounds)
        sums, sizes = np.bincount(which, values), np.bincount(which)
        without = (sums.sum() - sums) / (sizes.sum() - sizes)
        half = student(count - 1) * math.sqrt((count - 1) / count * float(((without - mean) ** 2).sum()))
        return cls(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]))


def few_questions(count: int) -> str:
    """The warning beside a comparison over few different questions."""
    return (
        f"the comparison is over {count} different questions only, so it says little of others (fewer than "
        f"{FEW_QUESTIONS}); raise [evaluation] episodes, or widen the task's options"
    )


def _constant(value: float, count: int, bounds: tuple[float, float]) -> MeanInterval:
    """Of questions never seen up to a share q may be otherwise: (1 - q) ** count = 2.5 %."""
    low, high = bounds
    reach = (1.0 - _MISS ** (1.0 / count)) * (high - low)
    if value == high:
        return MeanInterval(value, high - reach, high)
    if value == low:
        return MeanInterval(value, low, low + reach)
    return MeanInterval(value, value, value)


def student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, within 0.001 (Abramowitz and Stegun 26.7.5; exact for 1 to 3)."""
    if freedom in _SMALL_T:
        return _SMALL_T[freedom]
    z = _QUANTILE
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(freedom**power) for power, term in enumerate(terms, 1))
