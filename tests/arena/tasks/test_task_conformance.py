"""Every task keeps every law; and each law can tell a task that breaks it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import cache

import numpy as np
import pytest

from fedmoe.arena.tasks.conformance import LAWS, check_task, lineups
from fedmoe.arena.tasks.registry import make_task
from fedmoe.arena.tasks.task import (
    Episode,
    Lineup,
    Outcome,
    PromptMessage,
    Task,
    TaskError,
    check_actions,
    check_lineup,
)

TASKS = (
    "reasoning:chain_sum",
    "reasoning:spell_backward",
    "reasoning:mini_sudoku",
    "committee:chain_sum",
    "committee:letter_counting",
    "textarena:KuhnPoker-v0",
    "textarena:TicTacToe-v0",
    "textarena:PigDice-v0-short",
    "textarena:IteratedMatchingPennies-v0",
    "textarena:IteratedRockPaperScissors-v0",
    "textarena:IteratedPrisonersDilemma-v0",
)


@cache
def made(name: str) -> Task:
    return make_task(name)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", TASKS)
def test_a_task_keeps_the_law(name: str, law: str) -> None:
    assert made(name).name == name
    LAWS[law](made(name))


def test_committees_are_tried_in_every_strategy() -> None:
    tried = {team.strategy for lineup in lineups(made("committee:chain_sum")) for team in lineup.teams}
    assert tried >= {"shared", "independent", "leader"}


class GuessingEpisode:
    """A coin that every seat guesses, in one round; well behaved."""

    def __init__(self, seed: int, lineup: Lineup) -> None:
        self.coin = "ht"[np.random.default_rng(seed).integers(2)]
        self.lineup = lineup
        self.answers: Mapping[int, str] | None = None

    def to_act(self) -> tuple[int, ...]:
        return () if self.answers else tuple(range(self.lineup.seats))

    def observe(self, seat: int) -> tuple[PromptMessage, ...]:
        return (PromptMessage("user", f"seat {seat}: h or t? hint {self.coin}"),)

    def act(self, actions: Mapping[int, str]) -> None:
        check_actions(self.to_act(), actions)
        self.answers = dict(actions)

    def outcome(self) -> Outcome:
        if self.answers is None:
            raise TaskError("not over")
        scores = tuple(float(self.answers[seat] == self.coin) for seat in range(self.lineup.seats))
        teams = tuple(max(scores[seat] for seat in team.seats) for team in self.lineup.teams)
        return Outcome(scores, teams, tuple(float(self.answers[s] in ("h", "t")) for s in range(self.lineup.seats)))


class GuessingTask:
    """The coin as a task."""

    name = "test:coin"
    seats = (1, 4)
    zero_sum = False
    strategies: tuple[str, ...] = ()
    max_action_tokens = 2
    episode: Callable[[int, Lineup], Episode] = GuessingEpisode

    def start(self, seed: int, lineup: Lineup) -> Episode:
        check_lineup(self, lineup)
        return type(self).episode(seed, lineup)

    def random_action(self, episode: Episode, seat: int, rng: np.random.Generator) -> str:
        return "ht"[rng.integers(2)]


def test_a_well_behaved_plug_in_passes() -> None:
    check_task(GuessingTask())


class Restless(GuessingEpisode):
    def __init__(self, seed: int, lineup: Lineup) -> None:
        super().__init__(seed, lineup)
        self.coin = str(random.random())


class Reseeding(GuessingEpisode):
    def __init__(self, seed: int, lineup: Lineup) -> None:
        super().__init__(seed, lineup)
        random.seed(seed)


class Forgetful(GuessingEpisode):
    looks = 0

    def observe(self, seat: int) -> tuple[PromptMessage, ...]:
        self.looks += 1
        return (PromptMessage("user", f"look {self.looks}"),)


class Generous(GuessingEpisode):
    def outcome(self) -> Outcome:
        found = super().outcome()
        return Outcome(tuple(2.0 for _ in found.seat_scores), found.team_scores, found.valid)


class Premature(GuessingEpisode):
    def outcome(self) -> Outcome:
        return super().outcome() if self.answers else Outcome((0.0,), (0.0,), (1.0,))


class Fussy(GuessingEpisode):
    def outcome(self) -> Outcome:
        found = super().outcome()
        return Outcome(found.seat_scores, found.team_scores, tuple(0.5 for _ in found.valid))


class Entangled(GuessingEpisode):
    running = 0

    def __init__(self, seed: int, lineup: Lineup) -> None:
        super().__init__(seed, lineup)
        Entangled.running += 1
        self.coin = "ht"[Entangled.running % 2]

    def act(self, actions: Mapping[int, str]) -> None:
        super().act(actions)
        Entangled.running -= 1


class Careless(GuessingTask):
    def start(self, seed: int, lineup: Lineup) -> Episode:
        return GuessingEpisode(seed, lineup)


class Nameless(GuessingTask):
    name = "coin"


@pytest.mark.parametrize(
    ("law", "episode"),
    [
        ("repeats_by_seed", Restless),
        ("leaves_randomness_alone", Reseeding),
        ("is_observed_without_effect", Forgetful),
        ("takes_turns", Premature),
        ("has_sound_outcomes", Generous),
        ("has_legal_random_actions", Fussy),
        ("plays_interleaved", Entangled),
    ],
)
def test_a_law_tells_an_episode_that_breaks_it(law: str, episode: Callable[[int, Lineup], Episode]) -> None:
    task = type("Broken", (GuessingTask,), {"episode": episode})()
    with pytest.raises(TaskError, match="test:coin breaks the contract"):
        LAWS[law](task)


@pytest.mark.parametrize(("law", "task"), [("refuses_wrong_lineups", Careless()), ("has_sound_properties", Nameless())])
def test_a_law_tells_a_task_that_breaks_it(law: str, task: Task) -> None:
    with pytest.raises(TaskError, match="breaks the contract"):
        LAWS[law](task)
