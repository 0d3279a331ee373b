"""Population based training: when the worst policy becomes a perturbed copy of the best; the lineage of policies.

Jaderberg et al. 2017 (exploit and explore), with one difference: a policy is given up only when the ratings say
surely, not merely on average, that it is worse.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import BeforeValidator, PlainSerializer

from fedmoe.arena.population.rating import Ratings
from fedmoe.inference.engine import AdapterKey
from fedmoe.lora.adapter import Adapter
from fedmoe.runtime.saved_state import saved_state


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
    """The replacement to make now, if any: at most one, and only where the intervals (`SURELY`) are apart.

    Policies with fewer than `min_games` rated games neither go nor are copied. `since_last` is the number of
    iterations since the last replacement (None: there was none yet); before `cooldown` of them nothing is replaced.
    Raises ValueError for a policy that is not rated.
    """
    if min_games < 1 or cooldown < 0:
        raise ValueError(f"min_games must be at least 1 and cooldown at least 0, got {min_games} and {cooldown}")
    experienced = [policy for policy in policies if ratings[policy].games >= min_games]
    if len(experienced) < 2 or (since_last is not None and since_last < cooldown):
        return None
    best = min(experienced, key=lambda policy: (-ratings[policy].mu, policy))
    worst = min(experienced, key=lambda policy: (ratings[policy].mu, policy))
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
            # Drawn for zero factors too: the same generator then gives the same noise elsewhere, whatever is zero.
            noise = rng.standard_normal(factor.shape)
            length = relative * float(np.linalg.norm(factor.astype(np.float64)))
            factor += (noise * (length / float(np.linalg.norm(noise)))).astype(np.float32)
    return Adapter(adapter.layout, adapter.alpha, flat)


#: A key as it is saved: name and version.
_Key = Annotated[
    AdapterKey,
    BeforeValidator(lambda saved: AdapterKey(*saved) if isinstance(saved, list) else saved),
    PlainSerializer(lambda key: [key.name, key.version]),
]


@dataclass(frozen=True, slots=True)
class Birth:
    """One replacement: version `child` began as `parent` with noise `relative_noise` times its own length."""

    child: _Key
    parent: _Key
    iteration: int
    reason: str
    relative_noise: float


@dataclass
class PolicyLineage:
    """All births, the oldest first. A policy keeps its name when it is replaced, so descent is traced by version."""

    births: list[Birth] = field(default_factory=list)

    def add(self, birth: Birth) -> None:
        """Remember a birth; raises ValueError for one before the last, or whose child was born already."""
        if self.births and birth.iteration < self.births[-1].iteration:
            last = self.births[-1].iteration
            raise ValueError(f"births come in order: iteration {birth.iteration} is before the last one's, {last}")
        if birth.child == birth.parent or any(birth.child == earlier.child for earlier in self.births):
            raise ValueError(f"{birth.child} exists already; a name and version is never used again")
        self.births.append(birth)

    def since_last(self, iteration: int) -> int | None:
        """Iterations from the last birth to `iteration`; None before the first."""
        return iteration - self.births[-1].iteration if self.births else None

    def state(self) -> list[dict[str, object]]:
        """The births as JSON values."""
        return [saved_state(birth) for birth in self.births]


def _lineage(saved: Any) -> Any:
    return {"births": saved} if isinstance(saved, list) else saved


#: A lineage that is saved as the list of its births.
SavedLineage = Annotated[PolicyLineage, BeforeValidator(_lineage), PlainSerializer(PolicyLineage.state)]
