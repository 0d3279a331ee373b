"""A package from elsewhere, as its author would write it: a task, a mode, a credit rule, a metric and an engine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from fedmoe.arena.config import ArenaConfig, Option
from fedmoe.arena.modes.competitive import CompetitiveMode
from fedmoe.arena.modes.credit import SeatCredit, credit_rule, decompose
from fedmoe.arena.modes.judging import add_advantages, credit_seats, make_examples
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.protocol import Judgement, PlanInputs
from fedmoe.arena.rollout.episodes import EpisodePlan, PlayedEpisode
from fedmoe.arena.tasks.task import Episode, Lineup, Outcome, PromptMessage, TaskError, check_actions, check_lineup
from fedmoe.inference.engine import Engine, Sample, SampleRequest
from fedmoe.inference.transformers_engine import TransformersEngine
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.multilora import MultiLora

#: What its entry_points.txt says.
ENTRY_POINTS = f"""\
[fedmoe.tasks]
letters = {__name__}:make_letters
[fedmoe.modes]
neighbours = {__name__}:Neighbours
[fedmoe.credit]
generous = {__name__}:generous
[fedmoe.metrics]
letters_said = {__name__}:letters_said
[fedmoe.engines]
second_copy = {__name__}:second_copy
"""


class LettersEpisode:
    """Every seat says something, all at once; the share of lower-case letters in it is its score, a team's the best."""

    def __init__(self, lineup: Lineup) -> None:
        self._lineup = lineup
        self._said: dict[int, str] = {}

    def to_act(self) -> tuple[int, ...]:
        return () if self._said else tuple(range(self._lineup.seats))

    def observe(self, seat: int) -> tuple[PromptMessage, ...]:
        return (
            PromptMessage(
                "user", f"Say letters, {self._lineup.teams[self._lineup.team_of(seat)].strategy or 'plain'}."
            ),
        )

    def act(self, actions: Mapping[int, str]) -> None:
        check_actions(self.to_act(), actions)
        self._said = dict(actions)

    def outcome(self) -> Outcome:
        if not self._said:
            raise TaskError("nobody has spoken yet")
        scores = tuple(_share(self._said[seat]) for seat in range(self._lineup.seats))
        teams = tuple(max(scores[seat] for seat in team.seats) for team in self._lineup.teams)
        without = {
            seat: max(scores[other] for other in team.seats if other != seat)
            for team in self._lineup.teams
            for seat in team.seats
            if len(team.seats) > 1
        }
        return Outcome(scores, teams, tuple(1.0 for _ in scores), without=without)


def _share(text: str) -> float:
    return sum(letter.isascii() and letter.islower() for letter in text) / max(1, len(text))


class Letters:
    """The smallest task for teams and rivals: a random model does it a little, so that it can be learned at once."""

    name = "letters:lower"
    seats = (1, 8)
    zero_sum = False
    strategies: tuple[str, ...] = ("plain", "aloud")
    max_action_tokens = 6

    def start(self, seed: int, lineup: Lineup) -> LettersEpisode:
        check_lineup(self, lineup)
        return LettersEpisode(lineup)

    def random_action(self, episode: Episode, seat: int, rng: np.random.Generator) -> str:
        return "".join(rng.choice(list("abcXYZ"), 4))


def make_letters(which: str, options: Mapping[str, Option]) -> Letters:
    if which != "lower" or options:
        raise TaskError(f"there is letters:lower, without options, got {which!r} with {dict(options)}")
    return Letters()


def generous(outcome: Outcome, lineup: Lineup) -> tuple[SeatCredit, ...]:
    """Everybody gets the best score at the table."""
    best = max(outcome.seat_scores)
    return tuple(SeatCredit(best, parts) for parts in decompose(outcome, lineup))


class Neighbours:
    """Everybody for himself at one table, and all are paid by the rule `generous`."""

    name = "neighbours"
    playing = "neighbours"

    def __init__(self) -> None:
        self._table = CompetitiveMode()
        self._rule = credit_rule("generous")

    def check(self, task: Letters, policies: int) -> None:
        self._table.check(task, policies)

    def plan(self, society: ModeMemory, planning: PlanInputs) -> list[EpisodePlan]:
        return self._table.plan(society, planning)

    def judge(self, society: ModeMemory, planning: PlanInputs, played: Sequence[PlayedEpisode]) -> Judgement:
        results = add_advantages(society, planning, played, credit_seats(self._rule, played))
        return Judgement(make_examples(played, results), tuple(results))

    def state(self) -> dict[str, object]:
        return {}

    def restore(self, state: Mapping[str, object]) -> None:
        """Nothing to take over."""


def letters_said(played: Sequence[PlayedEpisode]) -> float:
    """How many letters an episode had on the mean."""
    return float(np.mean([sum(len(turn.text) for turn in episode.turns) for episode in played]))


class Counting(TransformersEngine):
    """Says at the end how many samples it was asked for, and of which policies."""

    def __init__(self, base: LoadedBase, file: Path) -> None:
        super().__init__(base, MultiLora(base.model))
        self._file = file
        self._asked: list[str] = []

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        self._asked += [str(one.adapter) for one in requests]
        return super().sample(requests)

    def close(self) -> None:
        self._file.write_text("\n".join(self._asked))
        super().close()


@contextmanager
def second_copy(config: ArenaConfig, folder: Path, base: LoadedBase) -> Iterator[Engine]:
    """Samples from a base model of its own."""
    engine = Counting(load_base(config.base_model, base.device, base.dtype), folder / "asked.txt")
    try:
        yield engine
    finally:
        engine.close()
