"""The pool of frozen opponents: which past champions are kept, and whom a policy plays next (prioritised self-play)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from fedmoe.arena.rollout.episodes import RANDOM, Player
from fedmoe.inference.engine import AdapterKey

#: The base model without an adapter.
BASE = "base"

#: How much of a game's weight is left after the next one, as in AlphaStar's published pseudocode: policies learn.
_MEMORY = 0.99
#: The share of meetings that is given out evenly, so that the references are met in every batch and rates of beaten
#: opponents stay fresh.
_EVEN_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Opponent:
    """A player that does not learn: a reference (`version` -1), a past champion, or an expert of another site.

    `strength` is its rating when it came, for keeping it.
    """

    name: str
    version: int
    kind: Literal["reference", "champion", "foreign"]
    strength: float = 0.0

    @property
    def key(self) -> AdapterKey | None:
        """Its weights; None for base and random."""
        return None if self.kind == "reference" else AdapterKey(self.name, self.version)

    @property
    def label(self) -> str:
        """`base`, `random` or `name@version`."""
        return str(self.key or self.name)

    def player(self) -> Player:
        """The player that it is in a seat."""
        return Player(self.label, self.key)


@dataclass
class OpponentPool:
    """Base, random, at most `champions` snapshots of past policies, and experts from other sites.

    What is no longer needed is returned by the method that dropped it, for the engine to unload. `results`: policy ->
    label of an opponent -> points won and games, both fading.
    """

    champions: int = 8
    opponents: list[Opponent] = field(
        default_factory=lambda: [Opponent(BASE, -1, "reference"), Opponent(RANDOM, -1, "reference")]
    )
    results: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.champions < 1:
            raise ValueError(f"the pool must hold at least one champion, got {self.champions}")

    def add_champion(self, key: AdapterKey, strength: float) -> tuple[AdapterKey, ...]:
        """Keep a snapshot with its rating; returns the snapshots that had to go for it.

        The newest half (rounded up) stays because it is what policies must beat now, and of the older ones the
        strongest, so that nothing that once worked is forgotten.
        """
        self._add(Opponent(key.name, key.version, "champion", strength))
        champions = [opponent for opponent in self.opponents if opponent.kind == "champion"]
        newest = (self.champions + 1) // 2
        older = sorted(champions[:-newest], key=lambda opponent: -opponent.strength)
        return self._drop(older[self.champions - newest :])

    def add_foreign(self, key: AdapterKey) -> tuple[AdapterKey, ...]:
        """Take in an expert of another site; returns its earlier version, which goes."""
        earlier = [o for o in self.opponents if o.kind == "foreign" and o.name == key.name]
        self._add(Opponent(key.name, key.version, "foreign"))
        return self._drop(earlier)

    def record(self, policy: str, opponent: str, score: float) -> None:
        """Take one result of `policy` against `opponent` (its label): 1 win, 0.5 draw, 0 loss, or between."""
        self._check(opponent)
        if not 0 <= score <= 1:
            raise ValueError(f"a result lies in [0, 1], got {score}")
        of_policy = self.results.setdefault(policy, {})
        won, games = of_policy.get(opponent, (0.0, 0.0))
        of_policy[opponent] = (won * _MEMORY + score, games * _MEMORY + 1.0)

    def win_rate(self, policy: str, opponent: str) -> float:
        """The share of points of `policy` against `opponent`, with one game won and one lost assumed beforehand."""
        self._check(opponent)
        won, games = self.results.get(policy, {}).get(opponent, (0.0, 0.0))
        return (won + 1.0) / (games + 2.0)

    def probabilities(self, policy: str) -> dict[str, float]:
        """With which probability each opponent is met next, by label.

        Prioritised fictitious self-play (AlphaStar; Vinyals et al. 2019): in proportion to (1 - p)^2, p the win rate,
        so that those who win are met most; `_EVEN_SHARE` in all is given out evenly.
        """
        labels = [opponent.label for opponent in self.opponents]
        weights = (1 - np.array([self.win_rate(policy, label) for label in labels])) ** 2
        chances = (1 - _EVEN_SHARE) * weights / weights.sum() + _EVEN_SHARE / len(labels)
        return {label: float(chance) for label, chance in zip(labels, chances, strict=True)}

    def sample(self, policy: str, rng: np.random.Generator) -> Opponent:
        """Draw an opponent for `policy`, with `probabilities`."""
        chances = np.array(list(self.probabilities(policy).values()))
        return self.opponents[int(rng.choice(len(chances), size=1, p=chances)[0])]

    def forget(self, policy: str) -> None:
        """Drop the results of a policy that was replaced; nothing happens for one without any."""
        self.results.pop(policy, None)

    def _check(self, label: str) -> None:
        labels = [opponent.label for opponent in self.opponents]
        if label not in labels:
            raise ValueError(f"opponent {label!r} is not in the pool; it holds: {', '.join(labels)}")

    def _add(self, opponent: Opponent) -> None:
        if any(opponent.label == other.label for other in self.opponents):
            raise ValueError(f"opponent {opponent.label!r} is in the pool already; a name and version is never reused")
        self.opponents.append(opponent)

    def _drop(self, dropped: Sequence[Opponent]) -> tuple[AdapterKey, ...]:
        for opponent in dropped:
            self.opponents.remove(opponent)
            for of_policy in self.results.values():
                of_policy.pop(opponent.label, None)
        return tuple(AdapterKey(opponent.name, opponent.version) for opponent in dropped)
