"""Committee tasks: team members draft, see their team's drafts and answer; the team's answer is a vote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fedmoe.arena.tasks.problems import INSTRUCTION, Ballot, ProblemSet, VerifiableProblem, quote, read_answer
from fedmoe.arena.tasks.task import (
    Episode,
    Lineup,
    Outcome,
    PromptMessage,
    TaskError,
    Team,
    check_actions,
    check_lineup,
)

#: How much of a draft is shown, in characters.
DRAFT_CHARS = 80

SHARED, INDEPENDENT, LEADER = "shared", "independent", "leader"


class CommitteeEpisode:
    """One problem in two rounds: drafts (unless `drafting` is off), then the final answer of every seat."""

    def __init__(self, problem: VerifiableProblem, lineup: Lineup, problems: ProblemSet, drafting: bool) -> None:
        self._problem = problem
        self._lineup = lineup
        self._multiline = problems.multiline
        self._examples = problems.examples
        drafters = [seat for team in lineup.teams for seat in _drafters(team)] if drafting else []
        self._drafters = tuple(sorted(drafters))
        self._drafts: dict[int, str] = {}
        self._drafting = bool(self._drafters)
        self._outcome: Outcome | None = None

    @property
    def content(self) -> str:
        """What the question is about: equal for questions that differ in order and wording only."""
        return self._problem.content

    def to_act(self) -> tuple[int, ...]:
        """The drafters, then all."""
        if self._outcome:
            return ()
        return self._drafters if self._drafting else tuple(range(self._lineup.seats))

    def observe(self, seat: int) -> tuple[PromptMessage, ...]:
        """The question; in the second round also the drafts that the seat may see."""
        if not 0 <= seat < self._lineup.seats:
            raise TaskError(f"there are seats 0 to {self._lineup.seats - 1}, got {seat}")
        lines = [self._problem.question.strip()]
        if seat in self._drafts:
            lines.append(f"Your draft: {self._shown(seat)}")
        team = self._lineup.teams[self._lineup.team_of(seat)]
        others = [self._shown(other) for other in _drafters(team) if other != seat and other in self._drafts]
        if others:
            lines.append(f"Drafts of your team: {'; '.join(others)}")
        return PromptMessage("system", INSTRUCTION), *self._examples, PromptMessage("user", "\n".join(lines))

    def act(self, actions: Mapping[int, str]) -> None:
        """Take the drafts, then the final answers."""
        check_actions(self.to_act(), actions)
        answers = {seat: read_answer(text, self._multiline) for seat, text in actions.items()}
        if self._drafting:
            self._drafts, self._drafting = answers, False
            return
        finals = [answers[seat] for seat in range(self._lineup.seats)]
        texts_of_seats = (
            [final, *([self._drafts[seat]] if seat in self._drafts else [])] for seat, final in enumerate(finals)
        )
        valid = tuple(sum(map(bool, texts)) / len(texts) for texts in texts_of_seats)
        outcome = Ballot.of(self._problem, finals).outcome(self._lineup, valid)
        drafted = {
            seat: (self._problem.score(draft), outcome.seat_scores[seat]) for seat, draft in self._drafts.items()
        }
        self._outcome = replace(outcome, turn_scores=drafted)

    def outcome(self) -> Outcome:
        """The votes over the final answers."""
        if self._outcome is None:
            raise TaskError(f"the episode is not over: seats {self.to_act()} are to act")
        return self._outcome

    def _shown(self, seat: int) -> str:
        return quote(self._drafts[seat], DRAFT_CHARS) or "(none)"


def _drafters(team: Team) -> tuple[int, ...]:
    """Who drafts, and is seen by the whole team, in speaking order."""
    if len(team.seats) == 1 or team.strategy == INDEPENDENT:
        return ()
    return team.seats[:1] if team.strategy == LEADER else team.seats


class CommitteeTask:
    """Members of a team work on one problem together; several teams on the same problem make a team battle.

    Round 1 is drafts, round 2 final answers, and the team's answer is the vote of its final answers (ties: the first
    speaker among them). Who drafts, and is seen by the whole team in round 2, is the team's strategy: `shared`
    every member, `leader` the first speaker only, `independent` none: then, and in a team of one, all answer at once.
    Teams never see each other. `seat_scores` are those of the seats' own final answers, `without` is the vote without
    the seat's.
    """

    kind = "committee"
    zero_sum = False
    seats = (1, 16)
    strategies: tuple[str, ...] = (SHARED, INDEPENDENT, LEADER)

    def __init__(self, problems: ProblemSet) -> None:
        """Any problems whose answers can be scored."""
        self.problems = problems

    @property
    def name(self) -> str:
        """`<kind>:<problems>`."""
        return f"{self.kind}:{self.problems.name}"

    @property
    def max_action_tokens(self) -> int:
        """Enough for the longest answer of many, or what the options say."""
        return self.problems.max_answer_tokens

    def start(self, seed: int, lineup: Lineup) -> CommitteeEpisode:
        """The problem of `seed`, before any answer."""
        check_lineup(self, lineup)
        return CommitteeEpisode(self.problems.draw(seed), lineup, self.problems, drafting=bool(self.strategies))

    def random_action(self, episode: Episode, seat: int, rng: np.random.Generator) -> str:
        """The right answer of another problem: well formed, and as good as a guess."""
        return self.problems.guess(rng)
