"""Examples, adapters and a small task for the tests of the AReaL back end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedmoe.arena.rollout.episodes import Example, PlayedTurn, Player
from fedmoe.arena.tasks.task import Episode, Lineup, Outcome, PromptMessage, Task, check_actions, check_lineup
from fedmoe.inference.engine import AdapterKey
from fedmoe.lora.adapter import FloatArray

VOCABULARY = 259


def example(
    prompt: Sequence[int],
    tokens: Sequence[int],
    advantage: float,
    behaviour: FloatArray | None = None,
    version: int = 0,
) -> Example:
    """One turn of a learning policy; without `behaviour` every token had probability one half."""
    own = np.full(len(tokens), np.log(0.5), np.float32) if behaviour is None else behaviour
    player = Player("solver", AdapterKey("solver", version), learning=True)
    turn = PlayedTurn(0, player, tuple(prompt), tuple(tokens), "", own, stopped=True)
    return Example("solver", turn, advantage, advantage)


def random_pairs(count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
    """Prompts of 3 to 40 tokens, each with 1 to 12 more."""
    rng = np.random.default_rng(seed)
    lengths = [(int(rng.integers(3, 41)), int(rng.integers(1, 13))) for _ in range(count)]
    return [(rng.integers(0, 256, p).tolist(), rng.integers(0, 256, t).tolist()) for p, t in lengths]


class CountingTask:
    """Seats say how many letters they count, in two rounds: the nearer to the seed's last digit, the better."""

    name = "test:counting"
    seats = (1, 4)
    zero_sum = False
    strategies = ("plain",)
    max_action_tokens = 8

    def start(self, seed: int, lineup: Lineup) -> CountingEpisode:
        check_lineup(self, lineup)
        return CountingEpisode(seed, lineup)

    def random_action(self, episode: Episode, seat: int, rng: np.random.Generator) -> str:
        return "x" * int(rng.integers(0, 10))


class CountingEpisode:
    """Every seat acts in both rounds, at the same time."""

    def __init__(self, seed: int, lineup: Lineup) -> None:
        self._wanted, self._lineup = seed % 10, lineup
        self.said: list[Mapping[int, str]] = []

    def to_act(self) -> tuple[int, ...]:
        return tuple(range(self._lineup.seats)) if len(self.said) < 2 else ()

    def observe(self, seat: int) -> tuple[PromptMessage, ...]:
        return (
            PromptMessage("system", "Count."),
            PromptMessage("user", f"Round {len(self.said)}, seat {seat}: {self._wanted}"),
        )

    def act(self, actions: Mapping[int, str]) -> None:
        check_actions(self.to_act(), actions)
        self.said.append(dict(actions))

    def outcome(self) -> Outcome:
        far = [
            np.mean([abs(len(said[seat]) - self._wanted) for said in self.said]) for seat in range(self._lineup.seats)
        ]
        scores = tuple(float(1.0 / (1.0 + distance)) for distance in far)
        teams = tuple(float(np.mean([scores[seat] for seat in team.seats])) for team in self._lineup.teams)
        return Outcome(scores, teams, (1.0,) * len(scores))


COUNTING: Task = CountingTask()
