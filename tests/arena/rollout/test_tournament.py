"""Tournaments of frozen players: who meets whom on what, how wins are split, and that nothing is left to luck."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import pytest
from letters import LettersEpisode, LettersTask

from fedmoe.arena.rollout.episodes import SCRIPTED, Player
from fedmoe.arena.rollout.evaluate import BASE, CHANCE
from fedmoe.arena.rollout.play import RolloutError, RolloutSettings
from fedmoe.arena.rollout.tournament import Meeting, Side, Tally, TournamentRow, TournamentTable, run_tournament
from fedmoe.arena.tasks.task import HELD_OUT, Lineup, Outcome, PromptMessage, TaskError
from fedmoe.arena.tasks.textarena_games import TextArenaTask
from fedmoe.inference.engine import AdapterKey, Engine, Sample, SampleRequest

SAYS = {"good": "abcd", "fair": "abλλ", "bad": "λλλλ", "mute": "", "base": "λλλλ"}
GOOD, FAIR, BAD, MUTE = (Player(name, AdapterKey(name, 1)) for name in ("good", "fair", "bad", "mute"))
RULES = Player(SCRIPTED, None)
DUEL = LettersTask((2, 2), zero_sum=True, strategies=(), name="test:duel")


class SayingEngine:
    """Everybody says what it always says; nobody else is asked."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        texts = [SAYS[request.adapter.name if request.adapter else "base"] for request in requests]
        return [Sample(tuple(map(ord, text)), np.zeros(len(text), np.float32), True) for text in texts]


def engine() -> Engine:
    """Players only ask for samples."""
    return cast(Engine, SayingEngine())


class PlainCodec:
    """Tokens are code points."""

    def prompt(self, messages: Sequence[PromptMessage]) -> tuple[int, ...]:
        return tuple(ord(letter) for letter in messages[-1].text)

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(chr(token) for token in tokens)


@dataclass(frozen=True)
class Strict(LettersTask):
    """Who says nothing loses at once, by an invalid move; keeps who sat where on which deal."""

    seats: tuple[int, int] = (2, 2)
    zero_sum: bool = True
    started: list[int] = field(default_factory=list)

    def start(self, seed: int, lineup: Lineup) -> LettersEpisode:
        self.started.append(seed)
        return _StrictEpisode(self, seed, lineup)


class _StrictEpisode(LettersEpisode):
    def act(self, actions: Mapping[int, str]) -> None:
        super().act(actions)
        self._silent = [seat for seat in sorted(actions) if not actions[seat]]

    def outcome(self) -> Outcome:
        found = super().outcome()
        valid = tuple(0.0 if seat in self._silent else 1.0 for seat in range(2))
        return replace(found, valid=valid, completed=not self._silent)


def table(task: LettersTask, players: Sequence[Player], deals: int = 6, seed: int = 0) -> TournamentTable:
    return run_tournament(task, players, engine(), PlainCodec(), deals, seed, RolloutSettings())


def row(found: TournamentTable, name: str) -> TournamentRow:
    return next(row for row in found.rows if row.player == name)


def counts(tally: Tally) -> tuple[int, ...]:
    return (
        *(tally.wins_by_play, tally.wins_by_errors, tally.draws),
        *(tally.losses_by_play, tally.losses_by_errors),
    )


def test_every_pair_meets_in_both_seatings_on_the_same_deals() -> None:
    task = Strict()
    found = table(task, [GOOD, FAIR, BAD], deals=4)
    assert Counter(task.started) == {HELD_OUT + deal: 6 for deal in range(4)}
    assert [(pair.first, pair.second, pair.tally.meetings) for pair in found.pairs] == [
        ("good", "fair", 8),
        ("good", "bad", 8),
        ("fair", "bad", 8),
    ]
    assert (found.questions, row(found, "fair").tally.meetings) == (4, 16)


@pytest.mark.parametrize("task", [LettersTask(), DUEL], ids=["questions", "game"])
def test_the_stronger_stand_higher(task: LettersTask) -> None:
    found = table(task, [BAD, GOOD, FAIR])
    assert [row.player for row in found.rows] == ["good", "fair", "bad"]
    assert [row.tally.points.mean for row in found.rows] == [1.0, 0.5, 0.0]
    lead = next(pair for pair in found.pairs if {pair.first, pair.second} == {"good", "bad"}).lead
    assert abs(lead.mean) == 1.0


def test_equal_players_draw_and_stand_by_name() -> None:
    found = table(DUEL, [BAD, BASE])
    assert [row.player for row in found.rows] == ["bad", "base"]
    assert counts(found.rows[0].tally) == (0, 0, 12, 0, 0)


def test_wins_are_split_into_own_play_and_the_opponents_errors() -> None:
    found = table(Strict(), [GOOD, FAIR, MUTE], deals=5)
    assert counts(row(found, "good").tally) == (10, 10, 0, 0, 0)
    assert counts(row(found, "fair").tally) == (0, 10, 0, 10, 0)
    assert counts(row(found, "mute").tally) == (0, 0, 0, 0, 20)


def test_an_invalid_move_that_the_game_went_on_after_decided_nothing() -> None:
    class Lenient(Strict):
        def start(self, seed: int, lineup: Lineup) -> LettersEpisode:
            return _LenientEpisode(self, seed, lineup)

    class _LenientEpisode(_StrictEpisode):
        def outcome(self) -> Outcome:
            return replace(super().outcome(), completed=True)

    assert counts(row(table(Lenient(), [GOOD, MUTE]), "good").tally) == (12, 0, 0, 0, 0)


def test_intervals_are_over_deals_and_not_over_meetings() -> None:
    def tally(deals: int, repeats: int) -> Tally:
        met = [
            Meeting(f"deal {deal}", Side(float(deal % 2), False), Side(0.5, False))
            for deal in range(deals)
            for _ in range(repeats)
        ]
        return Tally.of(met)

    assert tally(10, 50).points.high - tally(10, 50).points.low > 0.5
    assert tally(10, 50).points == tally(10, 1).points
    assert tally(500, 1).points.high - tally(500, 1).points.low < 0.1


def test_the_same_seed_gives_the_same_table_and_another_one_other_draws() -> None:
    def played(seed: int) -> TournamentTable:
        return table(DUEL, [FAIR, BAD, CHANCE], deals=30, seed=seed)

    assert played(0) == played(0)
    assert played(0) != played(1)


def test_a_real_game_is_played_by_the_scripted_and_the_random_player_beside_a_model() -> None:
    task, players = TextArenaTask("TicTacToe-v0"), [BASE, CHANCE, RULES]
    found = run_tournament(task, players, engine(), PlainCodec(), 6, 0, RolloutSettings())
    assert [row.player for row in found.rows] == [SCRIPTED, "random", "base"]
    scripted, base = row(found, SCRIPTED).tally, row(found, "base").tally
    assert (scripted.losses_by_play, scripted.losses_by_errors) == (0, 0)
    assert scripted.wins_by_errors == 12, "the base model says nothing that is a move"
    assert scripted.wins_by_play > 0, "chance is beaten by play"
    assert counts(base) == (0, 0, 0, 0, 24)


def test_players_that_cannot_meet_are_refused() -> None:
    with pytest.raises(TaskError, match="good comes more than once"):
        table(DUEL, [GOOD, BASE, GOOD])
    with pytest.raises(TaskError, match="two players or more, got good"):
        table(DUEL, [GOOD])
    with pytest.raises(TaskError, match="two players meet, test:letters needs 3 seats"):
        table(LettersTask((3, 4)), [GOOD, BAD])
    with pytest.raises(RolloutError, match="test:duel has no scripted player"):
        table(DUEL, [GOOD, RULES])
