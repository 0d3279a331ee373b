"""Episode log for people: which episodes of an iteration are kept, how their texts are cut, which are shown first.

RUN/episodes.jsonl holds one line an episode, the newest ones within a number of bytes. A run that is resumed repeats
iterations, so what an earlier start wrote of them goes first, and so does half a line of a process that was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict, cast

import numpy as np

from fedmoe.arena.config import EpisodesSection
from fedmoe.arena.reporting import IterationReport
from fedmoe.arena.rollout.episodes import PlayedEpisode, PlayedTurn
from fedmoe.runtime.files import write_atomic

EPISODES = "episodes.jsonl"
#: Of longer texts the end is left out, and `cut` says so: a model that does not stop must not fill the file.
MOST_CHARS = 4000

Order = Literal["newest", "lowest", "highest"]


class TurnRow(TypedDict):
    """What a seat saw last before it acted, what it said, in how many tokens, and whether it ended by itself."""

    saw: str
    said: str
    tokens: int
    ended: bool
    cut: bool


class SeatRow(TypedDict):
    """A seat: who sat there (`version` -1: no adapter), what it achieved and, if it learned, what that earned it."""

    policy: str
    version: int
    team: int
    strategy: str
    score: float
    valid: float
    reward: float | None
    turns: list[TurnRow]


class EpisodeRow(TypedDict):
    """An episode; `chosen` says why it was kept: as the lowest or highest reward of its iteration, or by chance."""

    iteration: int
    mode: str
    episode: int
    chosen: str
    question: str
    completed: bool
    seats: list[SeatRow]


class EpisodeLog:
    """Writes some episodes of every iteration and keeps the newest within a size, as its section says.

    Kept are those with the lowest and the highest mean reward, and others drawn from `seed` and iteration.
    """

    def __init__(self, path: Path, section: EpisodesSection, seed: int, iteration: int) -> None:
        """`iteration`: the one that comes next; rows of it and of later ones are forgotten."""
        self._path, self._per_iteration, self._seed = path, section.per_iteration, seed
        self._most = int(section.megabytes * (1 << 20))
        for leftover in path.parent.glob(f".{path.name}-*"):
            leftover.unlink()
        if path.exists():
            earlier = [line for line, row in _lines(path) if row["iteration"] < iteration]
            write_atomic(path, b"".join(_newest(earlier, self._most)))

    def write(self, report: IterationReport) -> None:
        """Write what is kept of one iteration; raises OSError when the disk does not take it."""
        if not self._per_iteration:
            return
        rows = _newest([json.dumps(row).encode() + b"\n" for row in self._rows(report)], self._most)
        size = self._path.stat().st_size if self._path.exists() else 0
        if size + sum(map(len, rows)) <= self._most:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(b"".join(rows))
            return
        # Down to half, so that this is not done anew in every iteration.
        room = max(0, self._most // 2 - sum(map(len, rows)))
        earlier = _newest([line for line, _ in _lines(self._path)], room) if size else []
        write_atomic(self._path, b"".join([*earlier, *rows]))

    def _rows(self, report: IterationReport) -> Iterator[EpisodeRow]:
        rewards: dict[int, dict[int, float]] = {}
        for result in report.judged.results:
            rewards.setdefault(result.episode, {})[result.seat] = result.credit.reward
        means = {episode: sum(seats.values()) / len(seats) for episode, seats in rewards.items()}
        rng = np.random.default_rng([self._seed, 4, report.iteration])
        for index, why in choose(means, self._per_iteration, rng):
            yield _row(report, index, why, rewards[index])


def choose(rewards: Mapping[int, float], count: int, rng: np.random.Generator) -> list[tuple[int, str]]:
    """Which of the episodes (index -> reward) are kept and why, by index; the extremes first if there is room."""
    if not rewards:
        return []
    why = {min(rewards, key=lambda index: (rewards[index], index)): "lowest"}
    why.setdefault(max(rewards, key=lambda index: (rewards[index], -index)), "highest")
    others = [index for index in rewards if index not in why]
    drawn = rng.permutation(len(others))[: max(0, count - len(why))]
    why |= {others[int(place)]: "drawn" for place in drawn}
    return sorted(list(why.items())[:count])


def _row(report: IterationReport, index: int, why: str, rewards: Mapping[int, float]) -> EpisodeRow:
    played = report.played[index]
    return {
        "iteration": report.iteration,
        "mode": report.mode,
        "episode": index,
        "chosen": why,
        "question": played.question[:MOST_CHARS],
        "completed": played.outcome.completed,
        "seats": [_seat(played, seat, rewards.get(seat)) for seat in range(played.plan.lineup.seats)],
    }


def _seat(played: PlayedEpisode, seat: int, reward: float | None) -> SeatRow:
    player, team = played.plan.players[seat], played.plan.lineup.team_of(seat)
    return {
        "policy": player.name,
        "version": player.key.version if player.key else -1,
        "team": team,
        "strategy": played.plan.lineup.teams[team].strategy,
        "score": played.outcome.seat_scores[seat],
        "valid": played.outcome.valid[seat],
        "reward": reward,
        "turns": [_turn(turn) for turn in played.turns if turn.seat == seat],
    }


def _turn(turn: PlayedTurn) -> TurnRow:
    return {
        "saw": turn.saw[:MOST_CHARS],
        "said": turn.text[:MOST_CHARS],
        "tokens": len(turn.tokens),
        "ended": turn.stopped,
        "cut": max(len(turn.saw), len(turn.text)) > MOST_CHARS,
    }


def _newest(lines: Sequence[bytes], most_bytes: int) -> list[bytes]:
    """The longest run of lines from the end within so many bytes."""
    start = len(lines)
    while start and len(lines[start - 1]) <= most_bytes:
        start -= 1
        most_bytes -= len(lines[start])
    return list(lines[start:])


def _lines(path: Path) -> Iterator[tuple[bytes, EpisodeRow]]:
    """Whole lines with what they say; a line that was cut, or that is none of ours, is left out."""
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                continue
            if isinstance(row, dict) and EpisodeRow.__required_keys__ <= row.keys():
                yield line, cast(EpisodeRow, row)


def read_episodes(path: Path) -> list[EpisodeRow]:
    """All episodes of a run's file, the oldest first; raises FileNotFoundError where there is none."""
    return [row for _, row in _lines(path)]


def reward_of(row: EpisodeRow, policy: str | None = None) -> float | None:
    """The mean reward of a policy's seats in an episode, or of all that learned; None where nobody did."""
    seats = [seat for seat in row["seats"] if policy in (None, seat["policy"])]
    rewards = [reward for seat in seats if (reward := seat["reward"]) is not None]
    return sum(rewards) / len(rewards) if rewards else None


def select(
    rows: Sequence[EpisodeRow],
    limit: int,
    order: Order = "newest",
    policy: str | None = None,
    iteration: int | None = None,
) -> list[EpisodeRow]:
    """At most `limit` episodes in which `policy` sat, of one iteration: the newest, or those that earned it least or
    most (equal rewards: the newer first; episodes in which it did not learn are left out then)."""
    matching = [
        row
        for row in rows
        if iteration in (None, row["iteration"])
        and (policy is None or any(seat["policy"] == policy for seat in row["seats"]))
    ]
    if order == "newest":
        return matching[-limit:]
    sign = 1 if order == "lowest" else -1
    rewards = [(reward_of(row, policy), -place) for place, row in enumerate(matching)]
    ranked = sorted((sign * reward, place) for reward, place in rewards if reward is not None)
    return [matching[-place] for _, place in ranked[:limit]]
