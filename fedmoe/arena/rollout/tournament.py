"""Round-robin tournaments of frozen players: every pair meets in both seatings on the same held-out deals or questions.

Nothing is learned and nothing is written. Equal players, deals and seed give the same table, bit for bit, on the same
machine. The best of a run was chosen by looking, so its lead is only as sure as the interval says.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fedmoe.arena.rollout.chat import Codec
from fedmoe.arena.rollout.episodes import EpisodePlan, PlayedEpisode, Player
from fedmoe.arena.rollout.interval import MeanInterval
from fedmoe.arena.rollout.play import RolloutSettings, play
from fedmoe.arena.tasks.task import HELD_OUT, Lineup, Task, TaskError
from fedmoe.inference.engine import Engine


@dataclass(frozen=True, slots=True)
class Side:
    """One player's part in a meeting: its score, and whether it failed (an invalid move or unusable answer)."""

    score: float
    failed: bool


@dataclass(frozen=True, slots=True)
class Meeting:
    """The meeting of two players on one deal or question, from the side of the first."""

    question: str
    own: Side
    other: Side

    @property
    def points(self) -> float:
        """1 for a win, 0.5 for a draw, 0 for a loss."""
        return 0.5 * (1.0 + float(np.sign(self.own.score - self.other.score)))


@dataclass(frozen=True, slots=True)
class Tally:
    """Meetings counted: a win is by own play unless the opponent failed; a loss is by one's own failure or by play."""

    meetings: int
    questions: int
    points: MeanInterval
    wins_by_play: int
    wins_by_errors: int
    draws: int
    losses_by_play: int
    losses_by_errors: int

    @classmethod
    def of(cls, met: Sequence[Meeting]) -> Tally:
        """Count; the interval is over different questions or deals."""
        questions = [meeting.question for meeting in met]
        points = np.array([meeting.points for meeting in met])
        won = [meeting for meeting in met if meeting.points == 1.0]
        lost = [meeting for meeting in met if meeting.points == 0.0]
        by_errors, own_errors = sum(win.other.failed for win in won), sum(loss.own.failed for loss in lost)
        return cls(
            len(met),
            len(set(questions)),
            MeanInterval.of(points, questions),
            len(won) - by_errors,
            by_errors,
            len(met) - len(won) - len(lost),
            len(lost) - own_errors,
            own_errors,
        )


@dataclass(frozen=True, slots=True)
class Pair:
    """The result of two players against each other, from the first one's side; `lead`: its paired score difference."""

    first: str
    second: str
    tally: Tally
    lead: MeanInterval


@dataclass(frozen=True, slots=True)
class TournamentRow:
    """A player's line in the table, over all its opponents; `score` is its own result on the task."""

    player: str
    score: MeanInterval
    tally: Tally


@dataclass(frozen=True)
class TournamentTable:
    """The result: rows from the most points to the fewest (equal points: by name), and every pair."""

    rows: tuple[TournamentRow, ...]
    pairs: tuple[Pair, ...]
    questions: int


def check_players(task: Task, players: Sequence[Player]) -> None:
    """Refuse too few players, equal names, and tasks at which two cannot meet, with TaskError."""
    names = [player.name for player in players]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TaskError(f"every player needs a name of its own, {', '.join(twice)} comes more than once")
    if len(players) < 2:
        raise TaskError(f"a tournament needs two players or more, got {', '.join(names) or 'none'}")
    if task.seats[0] > 2:
        raise TaskError(f"in a tournament two players meet, {task.name} needs {task.seats[0]} seats")


def run_tournament(
    task: Task,
    players: Sequence[Player],
    engine: Engine,
    codec: Codec,
    deals: int,
    seed: int,
    settings: RolloutSettings,
) -> TournamentTable:
    """Play `deals` held-out deals or questions: at a table for two every pair in both seatings, else each player alone.

    Raises TaskError (see `check_players`) and what tasks and engines raise.
    """
    check_players(task, players)
    at_tables = task.zero_sum or task.seats[0] == 2
    plans = _tables(players, deals) if at_tables else _alone(players, deals)
    played = play(task, plans, engine, codec, seed, settings)
    met = _met_at_tables(played) if at_tables else _met_on_questions(played, players)
    sides: dict[str, list[Meeting]] = {player.name: [] for player in players}
    for (first, second), meetings in met.items():
        sides[first] += meetings
        sides[second] += [Meeting(meeting.question, meeting.other, meeting.own) for meeting in meetings]
    rows = [_row(name, own) for name, own in sides.items()]
    rows.sort(key=lambda row: (-row.tally.points.mean, row.player))
    pairs = tuple(_pair(*names, meetings) for names, meetings in met.items())
    return TournamentTable(tuple(rows), pairs, rows[0].tally.questions)


def _tables(players: Sequence[Player], deals: int) -> list[EpisodePlan]:
    """Every pair at every deal, in both seatings; which seating it is stands in `sample`."""
    return [
        EpisodePlan(HELD_OUT + deal, Lineup.alone(2), seated, deal, seating)
        for pair in combinations(players, 2)
        for deal in range(deals)
        for seating, seated in enumerate((pair, pair[::-1]))
    ]


def _alone(players: Sequence[Player], deals: int) -> list[EpisodePlan]:
    """Every player before every question: where seats do not touch each other, all pairs follow from that."""
    return [
        EpisodePlan(HELD_OUT + deal, Lineup.alone(1), (player,), deal) for player in players for deal in range(deals)
    ]


def _met_at_tables(played: Sequence[PlayedEpisode]) -> dict[tuple[str, str], list[Meeting]]:
    met: dict[tuple[str, str], list[Meeting]] = defaultdict(list)
    for episode in played:
        seats = (0, 1) if episode.plan.sample == 0 else (1, 0)
        first, second = (episode.plan.players[seat].name for seat in seats)
        # A game goes on after some invalid moves; only one that it was broken off for was decided by them.
        own, other = (_side(episode, seat, decided=not episode.outcome.completed) for seat in seats)
        met[first, second].append(Meeting(episode.question, own, other))
    return met


def _met_on_questions(
    played: Sequence[PlayedEpisode], players: Sequence[Player]
) -> dict[tuple[str, str], list[Meeting]]:
    answered: dict[str, list[tuple[str, Side]]] = {player.name: [] for player in players}
    for episode in played:
        answered[episode.plan.players[0].name].append((episode.question, _side(episode, 0, decided=True)))
    return {
        (first, second): [
            Meeting(question, own, other)
            for (question, own), (_, other) in zip(answered[first], answered[second], strict=True)
        ]
        for first, second in combinations(answered, 2)
    }


def _side(episode: PlayedEpisode, seat: int, decided: bool) -> Side:
    return Side(episode.outcome.seat_scores[seat], decided and episode.outcome.valid[seat] < 1.0)


def _row(name: str, met: Sequence[Meeting]) -> TournamentRow:
    scores = np.array([meeting.own.score for meeting in met])
    return TournamentRow(name, MeanInterval.of(scores, [meeting.question for meeting in met]), Tally.of(met))


def _pair(first: str, second: str, met: Sequence[Meeting]) -> Pair:
    leads = np.array([meeting.own.score - meeting.other.score for meeting in met])
    lead = MeanInterval.of(leads, [meeting.question for meeting in met], (-1.0, 1.0))
    return Pair(first, second, Tally.of(met), lead)
