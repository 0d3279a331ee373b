"""Frozen opponents: who they are, which past champions are kept, and against whom a policy plays next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Self, TypedDict, cast

import numpy as np

from fedmoe.arena.rollout.episodes import RANDOM, Player
from fedmoe.inference.engine import AdapterKey

#: The base model without an adapter.
BASE = "base"

Kind = Literal["reference", "champion", "foreign"]
Weighting = Literal["hard", "even"]

#: How much of a game's weight is left after the next one, as in AlphaStar's published pseudocode: policies learn.
_MEMORY = 0.99


@dataclass(frozen=True, slots=True)
class Opponent:
    """A player that does not learn. `key` is None for base and random; `strength` is its rating, for keeping it."""

    name: str
    key: AdapterKey | None
    kind: Kind
    strength: float = 0.0

    def player(self) -> Player:
        """It in a seat."""
        return Player(self.name, self.key)


class _OpponentState(TypedDict):
    name: str
    version: int
    kind: Kind
    strength: float


class _PoolState(TypedDict):
    champions: int
    opponents: list[_OpponentState]
    results: dict[str, dict[str, tuple[float, float]]]


class OpponentPool:
    """Base, random, at most `champions` snapshots of past policies, and experts from other sites.

    Opponents are named `base`, `random` or `name@version`. What is no longer needed is returned by the method that
    dropped it, for the engine to unload.
    """

    def __init__(self, champions: int = 8) -> None:
        if champions < 1:
            raise ValueError(f"the pool must hold at least one champion, got {champions}")
        self._capacity = champions
        references = (Opponent(BASE, None, "reference"), Opponent(RANDOM, None, "reference"))
        self._opponents: dict[str, Opponent] = {opponent.name: opponent for opponent in references}
        self._results: dict[str, dict[str, tuple[float, float]]] = {}

    def opponents(self) -> tuple[Opponent, ...]:
        """Everybody in the pool: the references, then the others in the order they came."""
        return tuple(self._opponents.values())

    def add_champion(self, key: AdapterKey, strength: float) -> tuple[AdapterKey, ...]:
        """Keep a snapshot with its rating; returns the snapshots that had to go for it.

        The newest half (rounded up) stays because it is what policies must beat now, and of the older ones the
        strongest, so that nothing that once worked is forgotten.
        """
        self._add(Opponent(str(key), key, "champion", strength))
        champions = [opponent for opponent in self._opponents.values() if opponent.kind == "champion"]
        newest = (self._capacity + 1) // 2
        older = sorted(champions[:-newest], key=lambda opponent: -opponent.strength)
        return tuple(self._drop(opponent.name) for opponent in older[self._capacity - newest :])

    def add_foreign(self, key: AdapterKey) -> tuple[AdapterKey, ...]:
        """Take in an expert of another site; returns its earlier version, which goes."""
        known = self._opponents.values()
        earlier = [o.name for o in known if o.kind == "foreign" and o.key and o.key.name == key.name]
        self._add(Opponent(str(key), key, "foreign"))
        return tuple(self._drop(name) for name in earlier)

    def restrength(self, name: str, strength: float) -> None:
        """Note a newer rating of an opponent; raises ValueError for one that is not in the pool."""
        self._opponents[name] = replace(self._known(name), strength=strength)

    def record(self, policy: str, opponent: str, score: float) -> None:
        """Take one result of `policy` against `opponent`: 1 win, 0.5 draw, 0 loss, or between."""
        self._known(opponent)
        if not 0 <= score <= 1:
            raise ValueError(f"a result lies in [0, 1], got {score}")
        of_policy = self._results.setdefault(policy, {})
        won, games = of_policy.get(opponent, (0.0, 0.0))
        of_policy[opponent] = (won * _MEMORY + score, games * _MEMORY + 1.0)

    def win_rate(self, policy: str, opponent: str) -> float:
        """The share of points of `policy` against `opponent`, with one game won and one lost assumed beforehand."""
        self._known(opponent)
        won, games = self._results.get(policy, {}).get(opponent, (0.0, 0.0))
        return (won + 1.0) / (games + 2.0)

    def probabilities(
        self, policy: str, weighting: Weighting = "hard", floor: float = 0.1, without: Sequence[str] = ()
    ) -> dict[str, float]:
        """With which probability each opponent is met next; those in `without` never.

        Prioritised fictitious self-play (AlphaStar; Vinyals et al. 2019): in proportion to (1 - p)^2 ("hard": those
        who win) or to p (1 - p) ("even": those of one's own level), p the win rate. A share `floor` in all is given
        out evenly, so that the references are met in every batch and rates of beaten opponents stay fresh. Raises
        ValueError when nobody is left.
        """
        names = [name for name in self._opponents if name not in without]
        if not names or not 0 <= floor <= 1:
            raise ValueError(f"somebody must be left to play and the floor lie in [0, 1], got {names} and {floor}")
        rates = np.array([self.win_rate(policy, name) for name in names])
        weights = (1 - rates) ** 2 if weighting == "hard" else rates * (1 - rates)
        chances = (1 - floor) * weights / weights.sum() + floor / len(names)
        return {name: float(chance) for name, chance in zip(names, chances, strict=True)}

    def sample(
        self,
        policy: str,
        count: int,
        rng: np.random.Generator,
        weighting: Weighting = "hard",
        floor: float = 0.1,
        without: Sequence[str] = (),
    ) -> tuple[Opponent, ...]:
        """Draw `count` opponents for `policy`, with `probabilities` and independently of each other."""
        chances = self.probabilities(policy, weighting, floor, without)
        drawn = rng.choice(len(chances), size=count, p=np.array(list(chances.values())))
        names = list(chances)
        return tuple(self._opponents[names[int(index)]] for index in drawn)

    def forget(self, policy: str) -> None:
        """Drop the results of a policy that was replaced; nothing happens for one without any."""
        self._results.pop(policy, None)

    def state(self) -> dict[str, object]:
        """JSON types only; `from_state` gives an equal pool back."""
        opponents = [
            {"name": o.key.name, "version": o.key.version, "kind": o.kind, "strength": o.strength}
            if o.key
            else {"name": o.name, "version": -1, "kind": o.kind, "strength": o.strength}
            for o in self._opponents.values()
        ]
        results = {
            policy: {name: list(result) for name, result in known.items()} for policy, known in self._results.items()
        }
        return {"champions": self._capacity, "opponents": opponents, "results": results}

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> Self:
        """The pool that `state` wrote."""
        fields = cast(_PoolState, state)
        pool = cls(fields["champions"])
        for entry in fields["opponents"]:
            key = AdapterKey(entry["name"], entry["version"]) if entry["kind"] != "reference" else None
            opponent = Opponent(str(key) if key else entry["name"], key, entry["kind"], entry["strength"])
            pool._opponents[opponent.name] = opponent
        pool._results = {
            policy: {name: (won, games) for name, (won, games) in known.items()}
            for policy, known in fields["results"].items()
        }
        return pool

    def _known(self, name: str) -> Opponent:
        if name not in self._opponents:
            raise ValueError(f"opponent {name!r} is not in the pool; it holds: {', '.join(self._opponents)}")
        return self._opponents[name]

    def _add(self, opponent: Opponent) -> None:
        if opponent.name in self._opponents:
            raise ValueError(f"opponent {opponent.name!r} is in the pool already; a name and version is never reused")
        self._opponents[opponent.name] = opponent

    def _drop(self, name: str) -> AdapterKey:
        key = self._opponents.pop(name).key
        assert key is not None  # references never go
        for known in self._results.values():
            known.pop(name, None)
        return key
