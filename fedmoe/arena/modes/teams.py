"""Balanced teams: divides policies into teams of about equal rating, with varying partners."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations

import numpy as np

Split = tuple[tuple[str, ...], ...]

#: Up to so many splits all of them are compared (12 policies in 3 teams have 5775); above, the search is local.
EXACT_UP_TO = 10_000
#: How many exchanges of two policies the local search tries for each policy.
_EXCHANGES = 20


def spread(split: Split, strength: Mapping[str, float]) -> float:
    """The summed strength of the strongest team less that of the weakest, in rating points."""
    sums = [sum(strength[policy] for policy in team) for team in split]
    return max(sums) - min(sums)


def balanced_teams(strength: Mapping[str, float], teams: int, rng: np.random.Generator, slack: float = 1.0) -> Split:
    """Divide all policies (name -> mu) into `teams` teams of equal size and about equal summed mu.

    Drawn evenly among all splits whose spread is at most `slack` rating points above the least possible, so that
    partners vary (25 / 6 points are what chance alone is worth in a game). The order of the teams, and of the members
    of each, is drawn too. Above `EXACT_UP_TO` splits: snake order and random exchanges that keep the spread within
    `slack` of the best found. Raises ValueError when the policies cannot be divided evenly.
    """
    names = sorted(strength)
    if teams < 1 or not names or len(names) % teams:
        raise ValueError(f"{len(names)} policies cannot be divided into {teams} teams of equal size")
    if not (slack >= 0 and all(math.isfinite(mu) for mu in strength.values())):
        raise ValueError(f"slack must be at least 0 and strengths finite, got slack {slack} and {dict(strength)}")
    if split_count(len(names), teams) <= EXACT_UP_TO:
        split = _near_best(names, teams, strength, rng, slack)
    else:
        split = _exchanged(_snake(names, teams, strength), strength, rng, slack)
    shuffled = [tuple(team[int(i)] for i in rng.permutation(len(team))) for team in split]
    return tuple(shuffled[int(i)] for i in rng.permutation(len(shuffled)))


def split_count(policies: int, teams: int) -> int:
    """In how many ways policies can be divided into teams of equal size: n! / ((n / k)!^k k!)."""
    size = policies // teams
    alike: int = math.factorial(size) ** teams * math.factorial(teams)
    return math.factorial(policies) // alike


def _splits(names: Sequence[str], size: int) -> Iterator[Split]:
    """Every split once: the first name left over always opens the next team."""
    if not names:
        yield ()
        return
    first, rest = names[0], names[1:]
    for mates in combinations(rest, size - 1):
        unplaced = [name for name in rest if name not in mates]
        for others in _splits(unplaced, size):
            yield ((first, *mates), *others)


def _near_best(
    names: Sequence[str], teams: int, strength: Mapping[str, float], rng: np.random.Generator, slack: float
) -> Split:
    rated = [(spread(split, strength), split) for split in _splits(names, len(names) // teams)]
    # Sums of the same numbers in another order differ in the last digit; ties must stay ties.
    limit = min(rated)[0] + slack + 1e-9
    good = [split for difference, split in rated if difference <= limit]
    return good[int(rng.integers(len(good)))]


def _snake(names: Sequence[str], teams: int, strength: Mapping[str, float]) -> Split:
    """The strongest to team 0, the next to team 1, ... and on the way back from the last team to the first."""
    order = sorted(names, key=lambda name: (-strength[name], name))
    split: list[list[str]] = [[] for _ in range(teams)]
    for place, name in enumerate(order):
        lap, at = divmod(place, teams)
        split[at if lap % 2 == 0 else teams - 1 - at].append(name)
    return tuple(tuple(team) for team in split)


def _exchanged(split: Split, strength: Mapping[str, float], rng: np.random.Generator, slack: float) -> Split:
    current = [list(team) for team in split]
    best = spread(split, strength)
    for _ in range(_EXCHANGES * len(strength)):
        first, second = (current[int(team)] for team in rng.choice(len(current), 2, replace=False))
        i, j = rng.integers(len(first), size=2)
        first[i], second[j] = second[j], first[i]
        difference = spread(tuple(tuple(team) for team in current), strength)
        if difference <= best + slack:
            best = min(best, difference)
        else:
            first[i], second[j] = second[j], first[i]
    return tuple(tuple(team) for team in current)
