"""Held-out evaluation with an engine whose players are as strong as the test says (E5)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from letters import LettersEpisode, LettersTask, made_outcome

from fedmoe.arena.rollout.episodes import Player
from fedmoe.arena.rollout.evaluate import CHANCE, Comparison, HeldOutEvaluator
from fedmoe.arena.rollout.interval import MeanInterval
from fedmoe.arena.rollout.play import RolloutError, RolloutSettings
from fedmoe.arena.tasks.task import HELD_OUT, Lineup, Outcome, PromptMessage
from fedmoe.inference.engine import AdapterKey, Sample, SampleRequest

GOOD, EQUAL, BAD = (Player(name, AdapterKey(name, 3), learning=True) for name in ("good", "equal", "bad"))
STRENGTH = {"good": 0.8, "equal": 0.5, "bad": 0.2, "base": 0.5}
DUEL = LettersTask((2, 2), zero_sum=True, strategies=(), name="test:duel")


@dataclass
class StrengthEngine:
    """Draws characters that are ASCII with the probability of its adapter; the base model's is 0.5."""

    asked: list[SampleRequest] = field(default_factory=list)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        self.asked += requests
        return [self._one(request) for request in requests]

    def _one(self, request: SampleRequest) -> Sample:
        draws = np.random.default_rng(request.seed).random(request.max_new_tokens)
        strength = STRENGTH[request.adapter.name if request.adapter else "base"]
        tokens = tuple(97 if draw < strength else 955 for draw in draws)
        return Sample(tokens, np.zeros(len(tokens), np.float32), True)

    def players(self) -> Counter[str]:
        """How many actions each was asked for."""
        return Counter(request.adapter.name if request.adapter else "base" for request in self.asked)


class PlainCodec:
    """Tokens are code points."""

    def prompt(self, messages: Sequence[PromptMessage]) -> tuple[int, ...]:
        return tuple(ord(letter) for letter in messages[-1].text)

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens)


def evaluator(
    task: LettersTask | None = None, episodes: int = 60, engine: StrengthEngine | None = None, seed: int = 0
) -> HeldOutEvaluator:
    return HeldOutEvaluator(
        task or LettersTask(),
        engine or StrengthEngine(),  # type: ignore[arg-type]
        PlainCodec(),
        episodes,
        seed,
        RolloutSettings(),
    )


@pytest.mark.parametrize("task", [LettersTask(), DUEL], ids=["alone", "game"])
def test_a_better_policy_is_found_better_a_worse_one_worse_and_an_equal_one_neither(task: LettersTask) -> None:
    found = evaluator(task)
    good, equal, bad = (found.compare(player) for player in (GOOD, EQUAL, BAD))
    assert good.better
    assert good.wins.low > 0.5
    assert not equal.better
    assert equal.wins.low <= 0.5
    assert equal.gain.low <= 0 <= equal.gain.high
    assert bad.gain.high < 0
    assert bad.wins.high < 0.5


def test_the_numbers_are_those_of_the_players() -> None:
    found = evaluator(episodes=200).compare(GOOD)
    assert (found.policy, found.opponent, found.episodes, found.valid) == ("good", "base", 200, 1.0)
    assert found.score.low < 0.8 < found.score.high
    assert found.base.low < 0.5 < found.base.high
    assert found.gain.mean == pytest.approx(found.score.mean - found.base.mean)
    # Common random numbers: the better one is better in every single draw, so the gain is surer than either score.
    assert found.gain.high - found.gain.low < found.score.high - found.score.low + found.base.high - found.base.low


def test_more_episodes_are_surer() -> None:
    widths = [one.score.high - one.score.low for one in (evaluator(episodes=n).compare(GOOD) for n in (20, 320))]
    assert widths[1] < widths[0] / 2


def test_the_same_weights_get_the_same_result_and_another_seed_another() -> None:
    assert evaluator().compare(GOOD) == evaluator().compare(GOOD)
    assert evaluator(seed=1).compare(GOOD).score != evaluator().compare(GOOD).score


def test_an_equal_policy_is_compared_on_the_very_same_draws() -> None:
    found = evaluator().compare(EQUAL)
    assert found.gain == MeanInterval(0.0, 0.0, 0.0)
    assert found.wins == MeanInterval(0.5, 0.5, 0.5)


def test_the_base_model_plays_once_however_many_are_compared_with_it() -> None:
    engine = StrengthEngine()
    found = evaluator(episodes=10, engine=engine)
    for player in (GOOD, BAD, Player("untrained", None)):
        found.compare(player)
    assert engine.players() == {"good": 10, "bad": 10, "base": 10}


def test_an_untrained_policy_is_the_base_model_also_when_it_comes_first() -> None:
    engine = StrengthEngine()
    found = evaluator(episodes=10, engine=engine)
    first = found.compare(Player("untrained", None))
    assert first.gain == MeanInterval(0.0, 0.0, 0.0)
    assert found.compare(GOOD).base == first.base


@pytest.mark.parametrize("task", [LettersTask(), DUEL], ids=["alone", "game"])
@pytest.mark.parametrize(
    ("player", "opponent", "beats"),
    [
        (GOOD, Player("bad@2", AdapterKey("bad", 2)), True),
        (BAD, Player("good@2", AdapterKey("good", 2)), False),
        (GOOD, CHANCE, True),
        (BAD, CHANCE, False),
    ],
)
def test_against_a_frozen_opponent_points_are_counted(
    player: Player, opponent: Player, beats: bool, task: LettersTask
) -> None:
    found = evaluator(task).compare(player, opponent)
    assert found.opponent == opponent.name
    assert (found.wins.low > 0.5) == beats
    assert (found.wins.high < 0.5) == (not beats)
    assert found.base == evaluator(task).compare(player).base


@dataclass(frozen=True)
class FirstWins(LettersTask):
    """Who sits first wins, whatever is said; keeps the seeds of its episodes."""

    seats: tuple[int, int] = (2, 2)
    zero_sum: bool = True
    strategies: tuple[str, ...] = ()
    seeds: list[int] = field(default_factory=list)

    def start(self, seed: int, lineup: Lineup) -> LettersEpisode:
        self.seeds.append(seed)
        return _FirstWins(self, seed, lineup)


class _FirstWins(LettersEpisode):
    def outcome(self) -> Outcome:
        return made_outcome(self._lineup, [1.0, 0.0], [1.0, 0.5])


def test_games_alternate_seats_on_the_same_deal() -> None:
    task = FirstWins()
    found = evaluator(task, episodes=20).compare(GOOD)
    assert (found.score.mean, found.wins.mean, found.valid) == (0.5, 0.5, 0.75)
    assert (found.wins.low, found.wins.high) == (0.5, 0.5), "every deal was even"
    one_match = Counter(task.seeds[:20])
    assert one_match == {HELD_OUT + number: 2 for number in range(10)}
    assert set(task.seeds) == set(one_match), "every match has the same deals"


def test_only_held_out_problems_are_asked() -> None:
    class Recorded(LettersTask):
        def start(self, seed: int, lineup: Lineup) -> LettersEpisode:
            seeds.append(seed)
            return super().start(seed, lineup)

    seeds: list[int] = []
    evaluator(Recorded(), episodes=8).compare(GOOD)
    assert seeds == 2 * [HELD_OUT + number for number in range(8)]


def test_a_comparison_says_what_is_significant() -> None:
    def made(gain: MeanInterval) -> Comparison:
        half = MeanInterval(0.5, 0.4, 0.6)
        return Comparison("p", "base", 10, half, half, gain, half, 1.0, 10)

    assert made(MeanInterval(0.1, 0.01, 0.2)).better
    assert not made(MeanInterval(0.1, 0.0, 0.2)).better


@dataclass(frozen=True)
class SevenQuestions(LettersTask):
    """Whatever the seed, one of seven questions, each put in two ways; every answer to one is the same."""

    contents: bool = True

    def start(self, seed: int, lineup: Lineup) -> LettersEpisode:
        return (_Asking if self.contents else LettersEpisode)(self, seed % 7, lineup)


class _Asking(LettersEpisode):
    @property
    def content(self) -> str:
        return str(self._seed // 2)


@pytest.mark.parametrize(("contents", "questions"), [(True, 4), (False, 7)])
def test_episodes_about_the_same_question_count_once(contents: bool, questions: int) -> None:
    found = evaluator(SevenQuestions(contents=contents), episodes=140).compare(GOOD)
    assert (found.episodes, found.questions, found.few) == (140, questions, True)
    many = evaluator(episodes=140).compare(GOOD)
    assert (many.questions, many.few) == (140, False)


def test_both_seatings_of_a_deal_are_one_question() -> None:
    assert evaluator(DUEL, episodes=20).compare(GOOD).questions == 10


def test_nobody_is_asked_for_what_chance_plays_and_nothing_is_played_twice() -> None:
    engine = StrengthEngine()
    found = evaluator(DUEL, episodes=6, engine=engine)
    found.compare(GOOD, CHANCE)
    assert engine.players() == {"good": 6, "base": 6}
    found.compare(GOOD)
    assert engine.players() == {"good": 12, "base": 12}, "only the match between the two was new"


def test_the_best_is_named_only_where_it_is_apart_from_every_other() -> None:
    found = evaluator()
    leader = found.leader({"bad": BAD, "good": GOOD, "equal": EQUAL})
    assert (leader.policy, leader.rival, leader.apart, leader.questions) == ("good", "equal", True, 60)
    assert leader.lead.mean == pytest.approx(found.compare(GOOD).score.mean - found.compare(EQUAL).score.mean)
    twins = found.leader({"one": EQUAL, "other": Player("other", None), "bad": BAD})
    assert (twins.apart, twins.lead.mean) == (False, 0.0)


class SomeFail(LettersTask):
    """Every third episode breaks when it is scored."""

    def start(self, seed: int, lineup: Lineup) -> LettersEpisode:
        return (_Broken if seed % 3 == 0 else LettersEpisode)(self, seed, lineup)


class _Broken(LettersEpisode):
    def outcome(self) -> Outcome:
        raise ZeroDivisionError("no score")


def test_episodes_that_fail_are_left_out_of_both_sides_and_counted() -> None:
    found = evaluator(SomeFail(), episodes=30).compare(GOOD)
    assert (found.episodes, found.questions, found.failed) == (20, 20, 10)
    assert "no score" in found.reason
    assert found.gain.mean > 0


def test_where_all_held_out_episodes_fail_the_reason_is_told() -> None:
    class AllFail(SomeFail):
        def start(self, seed: int, lineup: Lineup) -> LettersEpisode:
            return _Broken(self, seed, lineup)

    with pytest.raises(RolloutError, match=r"no held-out episode of test:letters came to its end.*no score"):
        evaluator(AllFail(), episodes=4).compare(GOOD)
