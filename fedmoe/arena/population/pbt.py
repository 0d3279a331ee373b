"""Survival of the fittest: the worst policy gives way to a changed copy of the best, and who descends from whom.

Population based training (Jaderberg et al. 2017: exploit and explore), with one difference: a policy is given up only
when the ratings say surely, not merely on average, that it is worse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self, TypedDict, cast

import numpy as np

from fedmoe.arena.population.rating import Ratings
from fedmoe.inference.engine import AdapterKey
from fedmoe.lora.adapter import Adapter, FloatMatrix


@dataclass(frozen=True, slots=True)
class Replacement:
    """The decision that policy `worst` becomes a changed copy of policy `best`, and why, with the numbers."""

    worst: str
    best: str
    reason: str


#: Half the width of the intervals that must be apart, in sigma. Wider than 95 %, since they are looked at again and
#: again and the extreme pair of many is taken: of populations of four equal players, 200 rounds of games each, 20 %
#: lost one at 1.96, 3 % at 2.3 and 2 % at 2.58; four players 5 points apart took 28, 37 and 49 games (median).
SURELY = 2.3


def choose_replacement(
    ratings: Ratings, policies: Sequence[str], *, min_games: int, cooldown: int, since_last: int | None
) -> Replacement | None:
    """Which policy, if any, is replaced now: at most one, and only where the intervals (`SURELY`) are apart.

    Policies with fewer than `min_games` rated games neither go nor are copied. `since_last` is the number of
    iterations since the last replacement (None: there was none yet); before `cooldown` of them nothing is replaced.
    Raises ValueError for a policy that is not rated.
    """
    if min_games < 1 or cooldown < 0:
        raise ValueError(f"min_games must be at least 1 and cooldown at least 0, got {min_games} and {cooldown}")
    known = [policy for policy in policies if ratings[policy].games >= min_games]
    if len(known) < 2 or (since_last is not None and since_last < cooldown):
        return None
    best = min(known, key=lambda policy: (-ratings[policy].mu, policy))
    worst = min(known, key=lambda policy: (ratings[policy].mu, policy))
    if not ratings.separated(best, worst, SURELY):
        return None
    top, bottom = ratings[best], ratings[worst]
    reason = (
        f"{worst} is rated {bottom.mu:.2f} +- {bottom.sigma:.2f} after {bottom.games} games, "
        f"{best} {top.mu:.2f} +- {top.sigma:.2f} after {top.games}: apart at {SURELY:g} sigma"
    )
    return Replacement(worst, best, reason)


def perturb(adapter: Adapter, relative: float, rng: np.random.Generator) -> Adapter:
    """A copy with Gaussian noise in every A and B, `relative` times as long (Frobenius norm) as the factor itself.

    A factor that is zero stays zero: a fresh policy (B = 0) stays the base model exactly and only looks in other
    directions from there. Raises ValueError for a negative or infinite `relative`.
    """
    if not (math.isfinite(relative) and relative >= 0):
        raise ValueError(f"the relative noise must be a number of at least 0, got {relative}")
    flat = adapter.flat.copy()
    for _, a, b in adapter.layout.factors(flat):
        for factor in (a, b):
            factor += _noise_like(factor, relative, rng)
    return Adapter(adapter.layout, adapter.alpha, flat)


def _noise_like(factor: FloatMatrix, relative: float, rng: np.random.Generator) -> FloatMatrix:
    # Drawn for zero factors too: the same generator then gives the same noise elsewhere, whatever is zero.
    noise = rng.standard_normal(factor.shape)
    length = relative * float(np.linalg.norm(factor.astype(np.float64)))
    scaled: FloatMatrix = (noise * (length / float(np.linalg.norm(noise)))).astype(np.float32)
    return scaled


class _BirthState(TypedDict):
    child: tuple[str, int]
    parent: tuple[str, int]
    iteration: int
    reason: str
    relative_noise: float


@dataclass(frozen=True, slots=True)
class Birth:
    """One replacement: version `child` began as `parent` with noise `relative_noise` times its own length."""

    child: AdapterKey
    parent: AdapterKey
    iteration: int
    reason: str
    relative_noise: float


class PolicyLineage:
    """All births, in order. A policy keeps its name when it is replaced, so that descent is traced by version."""

    def __init__(self, births: Sequence[Birth] = ()) -> None:
        self._births: list[Birth] = []
        for birth in births:
            self.add(birth)

    @property
    def births(self) -> tuple[Birth, ...]:
        """Every birth, the oldest first."""
        return tuple(self._births)

    def add(self, birth: Birth) -> None:
        """Remember a birth; raises ValueError for one before the last, or whose child was born already."""
        if self._births and birth.iteration < self._births[-1].iteration:
            last = self._births[-1].iteration
            raise ValueError(f"births come in order: iteration {birth.iteration} is before the last one's, {last}")
        if birth.child == birth.parent or any(birth.child == known.child for known in self._births):
            raise ValueError(f"{birth.child} exists already; a name and version is never used again")
        self._births.append(birth)

    def since_last(self, iteration: int) -> int | None:
        """Iterations from the last birth to `iteration`; None before the first."""
        return iteration - self._births[-1].iteration if self._births else None

    def ancestors(self, key: AdapterKey) -> tuple[Birth, ...]:
        """How `key` came to be: the birth it goes back to, then that of its parent, and so on to the first line.

        A version goes back to the latest birth under its name that is not younger than itself.
        """
        found: list[Birth] = []
        at, before = key, len(self._births)
        while (index := self._origin(at, before)) is not None:
            found.append(self._births[index])
            at, before = self._births[index].parent, index
        return tuple(found)

    def family_tree(self, key: AdapterKey) -> str:
        """The descent of `key` in words, one line a generation, the founder first."""
        births = self.ancestors(key)
        founder = births[-1].parent.name if births else key.name
        lines = [f"{founder} (from the start)"]
        for depth, birth in enumerate(reversed(births), start=1):
            noise = f"noise {birth.relative_noise:g}"
            lines.append(f"{'  ' * depth}{birth.child} from {birth.parent} at iteration {birth.iteration}, {noise}")
        return "\n".join(lines)

    def state(self) -> list[dict[str, object]]:
        """JSON types only; `from_state` gives an equal lineage back."""
        return [
            {
                "child": [birth.child.name, birth.child.version],
                "parent": [birth.parent.name, birth.parent.version],
                "iteration": birth.iteration,
                "reason": birth.reason,
                "relative_noise": birth.relative_noise,
            }
            for birth in self._births
        ]

    @classmethod
    def from_state(cls, state: Sequence[Mapping[str, object]]) -> Self:
        """The lineage that `state` wrote."""
        births = []
        for entry in state:
            fields = cast(_BirthState, entry)
            child, parent = AdapterKey(*fields["child"]), AdapterKey(*fields["parent"])
            births.append(Birth(child, parent, fields["iteration"], fields["reason"], fields["relative_noise"]))
        return cls(births)

    def _origin(self, key: AdapterKey, before: int) -> int | None:
        for index in range(before - 1, -1, -1):
            child = self._births[index].child
            if child.name == key.name and child.version <= key.version:
                return index
        return None
