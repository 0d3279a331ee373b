"""Held-out episodes: is a policy better than the base model, by how much, and how sure is that?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.arena.chat import Codec
from fedmoe.arena.engines.protocol import AdapterKey, Engine
from fedmoe.arena.interval import FEW_QUESTIONS, Interval, Scores
from fedmoe.arena.rollout import RolloutSettings, play
from fedmoe.arena.task import HELD_OUT, Lineup, Task
from fedmoe.arena.trajectory import RANDOM, EpisodePlan, Player

BASE = Player("base", None)
CHANCE = Player(RANDOM, None)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A policy beside the base model on the same held-out episodes.

    `score`, `base`: own result on the task (a game: against the random player). `gain`: their paired difference.
    `wins`: share of points of the policy when it meets `opponent` (1 win, 0.5 draw, 0 loss). `valid`: share of usable
    actions, apart from winning. `questions`: how many different ones the episodes were about (in games: deals); they,
    not the episodes, make an interval narrow.
    """

    policy: str
    opponent: str
    episodes: int
    score: Interval
    base: Interval
    gain: Interval
    wins: Interval
    valid: float
    questions: int

    @property
    def few(self) -> bool:
        """Whether there are too few different questions to say much of others."""
        return self.questions < FEW_QUESTIONS

    @property
    def better(self) -> bool:
        """Whether the policy is significantly better than the base model on the task (95 %, paired)."""
        return self.gain.low > 0

    @property
    def beats(self) -> bool:
        """Whether it is significantly better than level against the opponent."""
        return self.wins.low > 0.5


@dataclass(frozen=True)
class _Played:
    scores: Scores
    valid: float
    questions: tuple[str, ...]


class Evaluator:
    """Plays held-out episodes of one task; equal seeds for all players, and results are kept to compare with."""

    def __init__(
        self, task: Task, engine: Engine, codec: Codec, episodes: int, seed: int, settings: RolloutSettings
    ) -> None:
        self._task, self._engine, self._codec = task, engine, codec
        self._episodes, self._seed, self._settings = episodes, seed, settings
        # A version never changes, and a champion is met by every policy.
        self._played: dict[AdapterKey | None, _Played] = {}

    def compare(self, player: Player, opponent: Player = BASE) -> Comparison:
        """`player` beside the base model on the task, and against `opponent`."""
        own, base = self._alone(player), self._alone(BASE)
        if self._task.zero_sum:
            wins = own.scores if opponent == CHANCE else self._match(player, opponent).scores
        else:
            other = self._alone(opponent)
            wins = np.where(own.scores > other.scores, 1.0, np.where(own.scores < other.scores, 0.0, 0.5))
        gain = own.scores - base.scores
        return Comparison(
            player.name,
            opponent.name,
            len(own.scores),
            Interval.of(own.scores, own.questions),
            Interval.of(base.scores, own.questions),
            Interval.of(gain, own.questions, (-1.0, 1.0)),
            Interval.of(wins, own.questions),
            own.valid,
            len(set(own.questions)),
        )

    def _alone(self, player: Player) -> _Played:
        if player == CHANCE:
            return self._episodes_of([player], alternate=False)
        if player.key not in self._played:
            alone = [player, CHANCE] if self._task.zero_sum else [player]
            self._played[player.key] = self._episodes_of(alone, alternate=self._task.zero_sum)
        return self._played[player.key]

    def _match(self, player: Player, opponent: Player) -> _Played:
        return self._episodes_of([player, opponent], alternate=True)

    def _episodes_of(self, players: Sequence[Player], alternate: bool) -> _Played:
        """The first player's results; in games it takes both seats in turn."""
        plans, seats = [], []
        for index in range(self._episodes):
            turned = alternate and index % 2 == 1
            seated = tuple(reversed(players)) if turned else tuple(players)
            seats.append(len(players) - 1 if turned else 0)
            # Both seatings of a game get the same deal.
            number = index // 2 if alternate else index
            plans.append(EpisodePlan(HELD_OUT + number, Lineup.alone(len(seated)), seated, index))
        played = play(self._task, plans, self._engine, self._codec, self._seed, self._settings)
        scores = [one.outcome.seat_scores[seat] for one, seat in zip(played, seats, strict=True)]
        valid = [one.outcome.valid[seat] for one, seat in zip(played, seats, strict=True)]
        questions = tuple(one.question for one in played)
        return _Played(np.array(scores, np.float64), float(np.mean(valid)), questions)
