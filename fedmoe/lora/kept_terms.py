"""What a merge by RegMean keeps for the next one: terms that depend on one expert and on all moments, never on a push.

A term is taken only where the same numbers went into it, so a merge with kept terms has the bits of one without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedmoe.lora.adapter import Adapter, Float64Array
from fedmoe.lora.moments import InputMoments, Inverse

#: At most so many bytes are kept; modules beyond are merged anew each time.
MOST_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Metric:
    """M + rho I of one group of modules: each expert's share of it, rho and the inverse."""

    shares: tuple[float, ...]
    rho: float
    inverse: Inverse

    @property
    def nbytes(self) -> int:
        return self.inverse.nbytes


@dataclass(frozen=True, slots=True)
class ExpertTerms:
    """One expert's rows under one metric and scale, by module: `images` before M^-1 and `solved` after it."""

    adapter: Adapter
    images: Mapping[str, Float64Array]
    solved: Mapping[str, Float64Array]

    @property
    def nbytes(self) -> int:
        return sum(rows.nbytes for rows in (*self.images.values(), *self.solved.values()))


#: Names of the modules with one metric, which experts do anything there, their weights, and the scale.
Setting = tuple[tuple[str, ...], tuple[bool, ...], tuple[float, ...], float]


@dataclass(slots=True)
class GroupTerms:
    """What is kept of modules with one input: the mean diagonal of each expert's G, metrics, and experts' terms.

    `moved` holds, by module and place of the expert, its adapter and whether it does anything there.
    """

    moments: tuple[InputMoments, ...]
    sizes: list[float] = field(default_factory=list)
    moved: dict[tuple[str, int], tuple[Adapter, bool]] = field(default_factory=dict)
    metrics: dict[Setting, Metric] = field(default_factory=dict)
    terms: dict[tuple[Setting, int], ExpertTerms] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """What the large arrays take."""
        metrics = sum(metric.nbytes for metric in self.metrics.values())
        return metrics + sum(terms.nbytes for terms in self.terms.values())


class KeptTerms:
    """Terms of the last merge by group, within a bound of bytes; for one merge at a time."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._groups: dict[tuple[str, ...], GroupTerms] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(group.nbytes for group in self._groups.values())

    def of(self, names: Sequence[str], moments: Sequence[InputMoments]) -> GroupTerms:
        """What is kept of these modules with these very moments, nothing where others were merged."""
        group = self._groups.get(tuple(names))
        if group is None or [id(one) for one in group.moments] != [id(one) for one in moments]:
            return GroupTerms(tuple(moments))
        return group

    def keep(self, names: Sequence[str], group: GroupTerms) -> None:
        """Keep the terms of a group instead of those before, if they fit."""
        self._groups.pop(tuple(names), None)
        if self.nbytes + group.nbytes <= self._most_bytes:
            self._groups[tuple(names)] = group


def same_module(left: Adapter, right: Adapter, name: str) -> bool:
    """Whether two adapters have the same factors of a module, bit for bit, and the same scale."""
    if left is right:
        return True
    pairs = zip(left.module(name), right.module(name), strict=True)
    return left.alpha == right.alpha and all(np.array_equal(*pair) for pair in pairs)
