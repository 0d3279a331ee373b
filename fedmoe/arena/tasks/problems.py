"""Verifiable problems: their protocols, reading an answer out of a text, and the vote of a team."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedmoe.arena.tasks.task import Lineup, Outcome, PromptMessage

#: The instruction besides the question; as the system message it takes the place of a template's longer one.
INSTRUCTION = "Reply with only the answer."

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


class VerifiableProblem(Protocol):
    """One problem with a verifiable answer."""

    @property
    def question(self) -> str:
        """What is asked, as plain text."""

    @property
    def answer(self) -> str:
        """The stored right answer (there may be others)."""

    @property
    def content(self) -> str:
        """What is asked apart from how: equal where operands are swapped or only the wording differs."""

    def score(self, answer: str) -> float:
        """How right `answer` is, in [0, 1]; never raises, whatever the text."""


class ProblemSet(Protocol):
    """Problems of one kind, drawn by a seed alone."""

    @property
    def name(self) -> str:
        """The name without a task's prefix, for example `chain_sum`."""

    @property
    def multiline(self) -> bool:
        """Whether a right answer may have several lines."""

    @property
    def examples(self) -> tuple[PromptMessage, ...]:
        """Questions with their answers, shown before every question so that a small model knows the form of both."""

    @property
    def max_answer_tokens(self) -> int:
        """How many tokens an answer needs at most."""

    def draw(self, seed: int) -> VerifiableProblem:
        """The problem of `seed`; no content of a seed from `HELD_OUT` on is ever drawn by a seed below."""

    def guess(self, rng: np.random.Generator) -> str:
        """A well-formed answer that knows nothing of the question."""


def read_answer(text: str, multiline: bool) -> str:
    """The answer in a text, "" where there is none.

    The inside of the last `<answer>...</answer>` if there is one; else the first line that is not blank, or the whole
    text for problems with answers of several lines. Outer white space goes. Nothing else is repaired: "The answer is
    5." is not 5.
    """
    if tagged := _TAGGED.findall(text):
        return str(tagged[-1]).strip()
    whole = text.strip()
    return whole if multiline else whole.split("\n", 1)[0].strip()


def quote(text: str, limit: int) -> str:
    """A player's text as others see it: on one line, at most `limit` characters, and no token of a chat template."""
    return " ".join(text.split()).replace("<|", "< |")[:limit]


def elect(speakers: Sequence[int], answers: Mapping[int, str]) -> int | None:
    """The speaker whose answer the vote takes: the first among those of the most frequent answer.

    Answers are compared in lower case and with runs of white space as one blank. Empty answers do not vote; among
    equally frequent answers the one of the earliest speaker wins. None: no seat voted.
    """
    votes = {seat: " ".join(answers[seat].casefold().split()) for seat in speakers if answers[seat]}
    count = Counter(votes.values())
    return max(votes, key=lambda seat: count[votes[seat]], default=None)


@dataclass(frozen=True, slots=True)
class Ballot:
    """Final answers and scores per seat; a team's score is that of the answer its vote takes, else 0."""

    answers: tuple[str, ...]
    scores: tuple[float, ...]

    @classmethod
    def of(cls, problem: VerifiableProblem, answers: Sequence[str]) -> Ballot:
        """Score every answer once; an empty one scores 0."""
        return cls(tuple(answers), tuple(problem.score(answer) if answer else 0.0 for answer in answers))

    def joint(self, speakers: Sequence[int]) -> float:
        """The score of the vote among `speakers`."""
        winner = elect(speakers, dict(enumerate(self.answers)))
        return 0.0 if winner is None else self.scores[winner]

    def outcome(self, lineup: Lineup, valid: tuple[float, ...]) -> Outcome:
        """Every team by its vote, and for each seat of a team of two or more the vote without it."""
        without = {
            seat: self.joint([other for other in team.seats if other != seat])
            for team in lineup.teams
            if len(team.seats) > 1
            for seat in team.seats
        }
        return Outcome(
            seat_scores=self.scores,
            team_scores=tuple(self.joint(team.seats) for team in lineup.teams),
            valid=valid,
            without=without,
        )
