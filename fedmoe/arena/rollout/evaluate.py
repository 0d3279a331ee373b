"""Held-out evaluation: compares policies with the base model and with each other, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmoe.arena.rollout.chat import Codec
from fedmoe.arena.rollout.episodes import RANDOM, EpisodePlan, Player
from fedmoe.arena.rollout.interval import FEW_QUESTIONS, MeanInterval, Scores
from fedmoe.arena.rollout.play import RolloutError, RolloutSettings, attempt
from fedmoe.arena.tasks.task import HELD_OUT, Lineup, Task
from fedmoe.inference.engine import AdapterKey, Engine

BASE = Player("base", None)
CHANCE = Player(RANDOM, None)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A policy beside the base model on the same held-out episodes.

    `score`, `base`: own result on the task (a game: against the random player). `gain`: their paired difference.
    `wins`: share of points of the policy when it meets `opponent` (1 win, 0.5 draw, 0 loss). `valid`: share of usable
    actions, apart from winning. `questions`: how many different ones the episodes were about (in games: deals); they,
    not the episodes, make an interval narrow. `failed`: episodes left out, since one of those compared did not come to
    its end in them; `reason`: why the first of them did not.
    """

    policy: str
    opponent: str
    episodes: int
    score: MeanInterval
    base: MeanInterval
    gain: MeanInterval
    wins: MeanInterval
    valid: float
    questions: int
    failed: int = 0
    reason: str = ""

    @property
    def few(self) -> bool:
        """Whether there are too few different questions to say much of others."""
        return self.questions < FEW_QUESTIONS

    @property
    def better(self) -> bool:
        """Whether the policy is significantly better than the base model on the task (95 %, paired)."""
        return self.gain.low > 0


@dataclass(frozen=True, slots=True)
class FrontRunner:
    """The policy with the best held-out score, and its lead over the rival from which it is least surely apart."""

    policy: str
    rival: str
    lead: MeanInterval
    questions: int

    @property
    def apart(self) -> bool:
        """Whether it is surely ahead of every other policy (95 %, paired over questions); only then is it the best."""
        return self.lead.low > 0


@dataclass(frozen=True)
class _PlayerScores:
    """The score and question of every episode, in their order: NaN where it failed, for the reason."""

    scores: Scores
    valid: float
    questions: tuple[str, ...]
    reason: str = ""


def _ended(*players: _PlayerScores) -> tuple[NDArray[np.bool_], list[str]]:
    """In which episodes all players came to the end, and the questions of these."""
    ended: NDArray[np.bool_] = np.all(np.isfinite([player.scores for player in players]), axis=0)
    return ended, [question for question, there in zip(players[0].questions, ended, strict=True) if there]


class HeldOutEvaluator:
    """Plays held-out episodes of one task; equal seeds for all players, and results are kept to compare with."""

    def __init__(
        self, task: Task, engine: Engine, codec: Codec, episodes: int, seed: int, settings: RolloutSettings
    ) -> None:
        self._task, self._engine, self._codec = task, engine, codec
        self._episodes, self._seed, self._settings = episodes, seed, settings
        # A version never changes, and a champion is met by every policy.
        self._played: dict[AdapterKey | None, _PlayerScores] = {}

    def compare(self, player: Player, opponent: Player = BASE) -> Comparison:
        """`player` beside the base model on the task, and against `opponent`."""
        own, base = self._alone(player), self._alone(BASE)
        if self._task.zero_sum:
            met = own if opponent == CHANCE else self._episodes_of([player, opponent], alternate=True)
            wins = met.scores
        else:
            met = self._alone(opponent)
            wins = np.where(own.scores > met.scores, 1.0, np.where(own.scores < met.scores, 0.0, 0.5))
        ended, questions = _ended(own, base, met)
        reason = own.reason or base.reason or met.reason
        if not questions:
            raise RolloutError(f"no held-out episode of {self._task.name} came to its end, the first by {reason}")
        mine, others = own.scores[ended], base.scores[ended]
        return Comparison(
            player.name,
            opponent.name,
            len(questions),
            MeanInterval.of(mine, questions),
            MeanInterval.of(others, questions),
            MeanInterval.of(mine - others, questions, (-1.0, 1.0)),
            MeanInterval.of(wins[ended], questions),
            own.valid,
            len(set(questions)),
            int((~ended).sum()),
            reason,
        )

    def leader(self, players: Mapping[str, Player]) -> FrontRunner:
        """The best of two or more on the task, over the same questions; `players` by the name of their policy."""
        scores = {name: float(np.nanmean(self._alone(player).scores)) for name, player in players.items()}
        first = max(scores, key=lambda name: scores[name])
        own, leads = self._alone(players[first]), []
        for name, player in players.items():
            if name != first:
                rival = self._alone(player)
                ended, questions = _ended(own, rival)
                lead = MeanInterval.of((own.scores - rival.scores)[ended], questions, (-1.0, 1.0))
                leads.append(FrontRunner(first, name, lead, len(set(questions))))
        return min(leads, key=lambda front_runner: front_runner.lead.low)

    def _alone(self, player: Player) -> _PlayerScores:
        if player == CHANCE:
            return self._episodes_of([player], alternate=False)
        if player.key not in self._played:
            alone = [player, CHANCE] if self._task.zero_sum else [player]
            self._played[player.key] = self._episodes_of(alone, alternate=self._task.zero_sum)
        return self._played[player.key]

    def _episodes_of(self, players: Sequence[Player], alternate: bool) -> _PlayerScores:
        """The first player's results; in games it takes both seats in turn."""
        plans, seats = [], []
        for index in range(self._episodes):
            turned = alternate and index % 2 == 1
            seated = tuple(reversed(players)) if turned else tuple(players)
            seats.append(len(players) - 1 if turned else 0)
            # Both seatings of a game get the same deal.
            number = index // 2 if alternate else index
            plans.append(EpisodePlan(HELD_OUT + number, Lineup.alone(len(seated)), seated, index))
        result = attempt(self._task, plans, self._engine, self._codec, self._seed, self._settings)
        by_index = {episode.plan.group: episode for episode in result.played}
        seated_in = [(by_index.get(index), seat) for index, seat in enumerate(seats)]
        scores = [episode.outcome.seat_scores[seat] if episode else np.nan for episode, seat in seated_in]
        valid = [episode.outcome.valid[seat] for episode, seat in seated_in if episode]
        questions = tuple(episode.question if episode else "" for episode, _ in seated_in)
        return _PlayerScores(
            np.array(scores, np.float64), float(np.mean(valid)) if valid else 0.0, questions, result.reason
        )
