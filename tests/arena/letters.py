"""A task that the tiny model can learn within seconds, and episodes of it made by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.arena.modes.protocol import PlanInputs
from fedmoe.arena.rollout.episodes import RANDOM, EpisodePlan, PlayedEpisode, PlayedTurn, Player
from fedmoe.arena.tasks.task import Lineup, Outcome, PromptMessage, TaskError, check_actions, check_lineup
from fedmoe.inference.engine import AdapterKey


class LettersEpisode:
    """Every seat says one thing, all at once; the share of ASCII characters in it is what it achieved."""

    def __init__(self, task: LettersTask, seed: int, lineup: Lineup) -> None:
        self._task = task
        self._seed = seed
        self._lineup = lineup
        self._said: dict[int, str] = {}

    def to_act(self) -> tuple[int, ...]:
        return () if self._said else tuple(range(self._lineup.seats))

    def observe(self, seat: int) -> tuple[PromptMessage, ...]:
        return (PromptMessage("user", f"Say letters, number {self._seed}."),)

    def act(self, actions: Mapping[int, str]) -> None:
        check_actions(self.to_act(), actions)
        self._said = dict(actions)

    def outcome(self) -> Outcome:
        if not self._said:
            raise TaskError("nobody has spoken yet")
        shares = [_share(self._said[seat]) for seat in range(self._lineup.seats)]
        if self._task.zero_sum:
            shares = [(1.0 + np.sign(share - other)) / 2 for share, other in zip(shares, reversed(shares), strict=True)]
        return made_outcome(self._lineup, [float(share) for share in shares])


def _share(text: str) -> float:
    return sum(letter.isascii() for letter in text) / max(1, len(text))


@dataclass(frozen=True)
class LettersTask:
    """As a game (`zero_sum`) two seats compare what they said."""

    seats: tuple[int, int] = (1, 8)
    zero_sum: bool = False
    strategies: tuple[str, ...] = ("aloud", "silently")
    name: str = "test:letters"
    max_action_tokens: int = 4

    def start(self, seed: int, lineup: Lineup) -> LettersEpisode:
        check_lineup(self, lineup)
        return LettersEpisode(self, seed, lineup)

    def random_action(self, episode: object, seat: int, rng: np.random.Generator) -> str:
        return "".join(chr(int(code)) for code in rng.integers(97, 160, 4))


def made_outcome(lineup: Lineup, scores: Sequence[float], valid: Sequence[float] | None = None) -> Outcome:
    """A team achieves what its best seat does."""
    teams = tuple(max(scores[seat] for seat in team.seats) for team in lineup.teams)
    without = {
        seat: max(scores[other] for other in team.seats if other != seat)
        for team in lineup.teams
        if len(team.seats) > 1
        for seat in team.seats
    }
    return Outcome(tuple(scores), teams, tuple(valid or [1.0] * len(scores)), without=without)


def planned(
    names: Sequence[str], task: LettersTask, iteration: int = 0, groups: int = 4, samples: int = 3, seed: int = 0
) -> PlanInputs:
    """What a trainer passes to a mode: every policy at the version of the iteration."""
    players = tuple(Player(name, AdapterKey(name, iteration), learning=True) for name in names)
    rng = np.random.default_rng([seed, iteration])
    return PlanInputs(iteration, task, players, groups, samples, rng)


def played(plan: EpisodePlan, score: Callable[[Player, int], float], valid: float = 1.0) -> PlayedEpisode:
    """The episode in which every player scores `score(player, sample)`; each takes one turn, chance none."""
    scores = [score(player, plan.sample) for player in plan.players]
    turns = tuple(
        PlayedTurn(seat, player, (1,), (2, 3), f"says {scores[seat]:g}", np.zeros(2, np.float32), True)
        for seat, player in enumerate(plan.players)
        if player.name != RANDOM
    )
    return PlayedEpisode(plan, turns, made_outcome(plan.lineup, scores, [valid] * len(scores)))
