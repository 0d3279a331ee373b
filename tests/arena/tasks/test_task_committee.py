"""Committees (E2, E4): who sees which drafts, by strategy; and the vote of the final answers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from fedmoe.arena.tasks.committee import DRAFT_CHARS, CommitteeEpisode, CommitteeTask
from fedmoe.arena.tasks.task import Lineup, PromptMessage, TaskError, Team


@dataclass(frozen=True)
class Capital:
    """One question; anything else than Rome is worth a little."""

    question: str = "Capital of Italy?"
    answer: str = "Rome"
    content: str = "Italy"

    def score(self, answer: str) -> float:
        return 1.0 if answer.casefold() == "rome" else 0.1


class Capitals:
    """The same question for every seed."""

    name = "capitals"
    multiline = False
    max_answer_tokens = 9
    examples = (PromptMessage("user", "Capital of France?"), PromptMessage("assistant", "Paris"))

    def draw(self, seed: int) -> Capital:
        return Capital()

    def guess(self, rng: np.random.Generator) -> str:
        return "Milan"


def started(*teams: Team) -> CommitteeEpisode:
    return CommitteeTask(Capitals()).start(0, Lineup(teams))


def seen(episode: CommitteeEpisode, seat: int) -> str:
    return episode.observe(seat)[-1].text


def test_members_draft_before_they_see_anything() -> None:
    episode = started(Team((0, 2)), Team((1,)))
    assert episode.to_act() == (0, 2)
    assert {seen(episode, seat) for seat in range(3)} == {"Capital of Italy?"}


@pytest.mark.parametrize("strategy", ["", "shared"])
def test_shared_drafts_are_seen_in_speaking_order_by_the_own_team_only(strategy: str) -> None:
    episode = started(Team((2, 0, 1), strategy), Team((3,)))
    episode.act({0: "Rome", 1: "Pisa", 2: "Milan\nbecause"})
    assert episode.to_act() == (0, 1, 2, 3)
    assert seen(episode, 1) == "Capital of Italy?\nYour draft: Pisa\nDrafts of your team: Milan; Rome"
    assert seen(episode, 3) == "Capital of Italy?"


def test_independent_members_answer_at_once_and_see_nobody() -> None:
    episode = started(Team((0, 1), "independent"))
    assert seen(episode, 0) == "Capital of Italy?"
    episode.act({0: "Rome", 1: "Pisa"})
    assert episode.to_act() == ()
    assert episode.outcome().seat_scores == (1.0, 0.1)


def test_a_leader_drafts_alone_and_the_others_see_that_draft() -> None:
    episode = started(Team((1, 0, 2), "leader"), Team((3, 4)))
    assert episode.to_act() == (1, 3, 4)
    episode.act({1: "Rome", 3: "Pisa", 4: "Bari"})
    assert seen(episode, 0) == seen(episode, 2) == "Capital of Italy?\nDrafts of your team: Rome"
    assert seen(episode, 1) == "Capital of Italy?\nYour draft: Rome"
    assert episode.to_act() == (0, 1, 2, 3, 4)


def test_a_leaders_team_is_judged_by_its_answers_only() -> None:
    episode = started(Team((1, 0), "leader"))
    episode.act({1: ""})
    assert "Drafts of your team: (none)" in seen(episode, 0)
    episode.act({0: "Rome", 1: "Rome"})
    assert episode.outcome().valid == (1.0, 0.5)
    assert episode.outcome().team_scores == (1.0,)


def test_long_and_tricky_drafts_are_shown_short_and_harmless() -> None:
    episode = started(Team((0, 1)))
    episode.act({0: "<|im_end|>" + "x" * 500, 1: "Rome"})
    shown = seen(episode, 1).split("Drafts of your team: ")[1]
    assert "<|" not in shown
    assert len(shown) == DRAFT_CHARS


def test_teams_battle_over_the_same_problem_by_votes_of_final_answers() -> None:
    episode = started(Team((0, 1, 2)), Team((3, 4), "independent"))
    episode.act(dict.fromkeys(range(3), "Milan"))
    episode.act({0: "Pisa", 1: "rome", 2: "Rome", 3: "Pisa", 4: "Rome"})
    outcome = episode.outcome()
    assert outcome.seat_scores == (0.1, 1.0, 1.0, 0.1, 1.0)
    assert outcome.team_scores == (1.0, 0.1)
    # Without a second vote for Rome, the first speaker's Pisa takes the tie.
    assert outcome.without == {0: 1.0, 1: 0.1, 2: 0.1, 3: 1.0, 4: 0.1}
    assert outcome.valid == (1.0,) * 5
    assert episode.to_act() == ()


def test_drafts_count_for_nothing_but_validity() -> None:
    episode = started(Team((0, 1)))
    episode.act({0: "Rome", 1: "Rome"})
    episode.act({0: "", 1: ""})
    assert episode.outcome().team_scores == (0.0,)
    assert episode.outcome().valid == (0.5, 0.5)


def test_whoever_is_alone_answers_at_once() -> None:
    episode = started(Team((0,)), Team((1,), "leader"))
    assert episode.to_act() == (0, 1)
    episode.act({0: "Rome", 1: ""})
    assert episode.outcome().team_scores == (1.0, 0.0)
    assert episode.outcome().valid == (1.0, 0.0)
    assert not episode.outcome().without


def test_the_problems_examples_come_before_the_question() -> None:
    episode = started(Team((0, 1)))
    assert [message.role for message in episode.observe(0)] == ["system", "user", "assistant", "user"]
    assert episode.observe(0)[1:3] == Capitals.examples


def test_other_strategies_are_refused_by_name() -> None:
    with pytest.raises(TaskError, match="it has: shared, independent, leader"):
        started(Team((0, 1), "debate"))


def test_a_seat_that_is_not_there_sees_nothing() -> None:
    with pytest.raises(TaskError, match="seats 0 to 1"):
        started(Team((0, 1))).observe(2)
