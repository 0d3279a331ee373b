"""The task protocol: the environment in which policies meet, with seats that policies fill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from fedmoe.runtime.errors import ExpectedError

Role = Literal["system", "user", "assistant"]


class TaskError(ExpectedError, ValueError):
    """A task, line-up or action that cannot be used; says what was got and what would do."""


#: What sums of weights may miss 1 by.
_ROUNDING = 1e-6


@dataclass(frozen=True, slots=True)
class PromptMessage:
    """One message of what a seat sees, in chat form."""

    role: Role
    text: str


@dataclass(frozen=True, slots=True)
class Team:
    """Seats that share one outcome, and how they work: `strategy` is one of the task's `strategies`, "" the plain one.

    `seats` are in speaking order: where an order matters, the first speaks first.
    """

    seats: tuple[int, ...]
    strategy: str = ""


@dataclass(frozen=True, slots=True)
class Lineup:
    """The assignment of seats to teams: every seat belongs to exactly one team. Seats are numbered from 0."""

    teams: tuple[Team, ...]

    def __post_init__(self) -> None:
        seats = sorted(seat for team in self.teams for seat in team.seats)
        if not seats or seats != list(range(len(seats))) or any(not team.seats for team in self.teams):
            raise TaskError(f"every seat from 0 on belongs to exactly one team that is not empty, got {self.teams}")

    @property
    def seats(self) -> int:
        """How many seats there are."""
        return sum(len(team.seats) for team in self.teams)

    def team_of(self, seat: int) -> int:
        """The index of the team that `seat` belongs to."""
        return next(index for index, team in enumerate(self.teams) if seat in team.seats)

    @classmethod
    def alone(cls, seats: int) -> Lineup:
        """Every seat for itself: one team a seat."""
        return cls(tuple(Team((seat,)) for seat in range(seats)))

    @classmethod
    def together(cls, seats: int, strategy: str = "") -> Lineup:
        """All seats in one team."""
        return cls((Team(tuple(range(seats)), strategy),))


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of an episode, as measured by the task; every score in [0, 1], where 1 is best.

    `seat_scores`: what each seat achieved by itself (its own answer; in a game win 1, draw 0.5, loss 0).
    `team_scores`: the joint outcome of each team of the line-up (for a team of one: its seat's score).
    `without`: seat -> its team's joint outcome without that seat, for seats where that can be scored again.
    `valid`: per seat the share of its actions that were legal or could be parsed, apart from winning.
    `turn_scores`: seat -> what each of its actions achieved by itself, where the task scores actions one by one.
    `completed`: whether the episode came to a proper end (not broken off by an illegal move or a limit).
    """

    seat_scores: tuple[float, ...]
    team_scores: tuple[float, ...]
    valid: tuple[float, ...]
    completed: bool = True
    without: Mapping[int, float] = field(default_factory=dict)
    turn_scores: Mapping[int, tuple[float, ...]] = field(default_factory=dict)


def check_outcome(outcome: Outcome, lineup: Lineup) -> Outcome:
    """Return the outcome if it fits the line-up; raises `TaskError` for a score that is missing or not in [0, 1]."""
    counts = (len(outcome.seat_scores), len(outcome.team_scores), len(outcome.valid))
    if counts != (lineup.seats, len(lineup.teams), lineup.seats):
        raise TaskError(f"an outcome has {counts} scores of seats, teams and validity; {lineup} is asked for")
    seats = {*outcome.without, *outcome.turn_scores}
    if not seats <= set(range(lineup.seats)):
        raise TaskError(f"an outcome scores seats {sorted(seats)}, there are {lineup.seats}")
    scores = [*outcome.seat_scores, *outcome.team_scores, *outcome.valid, *outcome.without.values()]
    scores += [score for some in outcome.turn_scores.values() for score in some]
    wrong = [score for score in scores if not -_ROUNDING <= score <= 1 + _ROUNDING]  # true for a NaN too
    if wrong:
        raise TaskError(f"a score is {wrong[0]}; every one is between 0 and 1")
    return outcome


class Episode(Protocol):
    """One run of a task; deterministic given the task, the seed, the line-up and the actions."""

    def to_act(self) -> tuple[int, ...]:
        """The seats whose action is wanted now, in ascending order; empty when the episode is over."""

    def observe(self, seat: int) -> tuple[PromptMessage, ...]:
        """Everything that `seat` sees now; asking again changes nothing. The last message is the user's."""

    def act(self, actions: Mapping[int, str]) -> None:
        """Take one text from every seat of `to_act()`; raises TaskError when the seats differ. Any text is allowed."""

    def outcome(self) -> Outcome:
        """The result; raises TaskError before the end."""


@runtime_checkable
class QuestionEpisode(Protocol):
    """An episode that knows what its question is about; for tasks whose questions may be put in several ways."""

    @property
    def content(self) -> str:
        """Equal for questions that differ in order or wording only; such are never both trained on and held out."""


@runtime_checkable
class ScriptedTask(Protocol):
    """A task that may have a player of known, high strength beside the random one."""

    @property
    def scripted(self) -> bool:
        """Whether there is one."""

    def scripted_action(self, episode: Episode, seat: int, rng: np.random.Generator) -> str:
        """Its action; raises TaskError where there is none."""


class Task(Protocol):
    """A kind of episode. Equal seeds give equal episodes; seeds from `HELD_OUT` on are never trained on."""

    @property
    def name(self) -> str:
        """The name in configurations and records, for example `reasoning:chain_sum` or `textarena:KuhnPoker-v0`."""

    @property
    def seats(self) -> tuple[int, int]:
        """The least and the most seats."""

    @property
    def zero_sum(self) -> bool:
        """Whether one seat's gain is another's loss by the rules (a game), rather than by how a mode rewards it."""

    @property
    def strategies(self) -> tuple[str, ...]:
        """How a team may work together, the plain way first; () where teams have no say."""

    @property
    def max_action_tokens(self) -> int:
        """How many tokens an action needs at most."""

    def start(self, seed: int, lineup: Lineup) -> Episode:
        """A new episode; raises TaskError for a line-up the task cannot seat."""

    def random_action(self, episode: Episode, seat: int, rng: np.random.Generator) -> str:
        """A uniformly drawn legal (or well-formed) action of `seat`: the player of known, low strength."""


#: Seeds of held-out episodes start here; training draws from [0, HELD_OUT).
HELD_OUT = 1_000_000_000


def question_of(task: Task, episode: Episode, seed: int) -> str:
    """The question an episode that has just begun is about: episodes of one question are no independent evidence.

    Its `content` where it is a `QuestionEpisode`; in a game for two the deal, that is the seed; else what its seats see
    at first, whatever the case and white space.
    """
    if isinstance(episode, QuestionEpisode):
        return episode.content
    if task.zero_sum:
        return f"deal {seed}"
    seen = [message.text for seat in episode.to_act() for message in episode.observe(seat)]
    return " ".join(" ".join(seen).casefold().split())


def check_lineup(task: Task, lineup: Lineup) -> None:
    """Refuse a line-up with too few or too many seats or an unknown strategy, with TaskError."""
    least, most = task.seats
    if not least <= lineup.seats <= most:
        raise TaskError(f"{task.name} seats {least} to {most}, the line-up has {lineup.seats}")
    for team in lineup.teams:
        if team.strategy and team.strategy not in task.strategies:
            strategies = ", ".join(task.strategies) or "none"
            raise TaskError(f"{task.name} has no strategy {team.strategy!r}; it has: {strategies}")


def check_actions(seats: Sequence[int], actions: Mapping[int, str]) -> None:
    """Refuse actions of other seats than those whose turn it is, with TaskError."""
    if sorted(actions) != sorted(seats):
        raise TaskError(f"seats {sorted(seats)} are to act, got actions of {sorted(actions)}")
