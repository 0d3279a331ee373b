"""Episodes that can be read: which are kept, within how much room, and what a resumed run does with what was there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from letters import made_outcome

from fedmoe.arena.config import EpisodesSection
from fedmoe.arena.modes.credit import Credit, SeatCredit
from fedmoe.arena.modes.protocol import Judgement, SeatResult
from fedmoe.arena.reporting import IterationReport
from fedmoe.arena.rollout.episodes import EpisodePlan, PlayedEpisode, PlayedTurn, Player
from fedmoe.arena.run.episode_log import EpisodeLog, EpisodeRow, choose, read_episodes, reward_of, select
from fedmoe.arena.tasks.task import Lineup
from fedmoe.inference.engine import AdapterKey

ANN = Player("ann", AdapterKey("ann", 3), learning=True)
BASE = Player("base", None)
REWARDS = (0.5, -1.0, 0.25, 2.0, 0.75, 0.0)


def made_report(iteration: int = 7, rewards: Sequence[float] = REWARDS, text: str = "9") -> IterationReport:
    """Ann beside the base model; she earns `rewards`, it learns nothing."""
    played = [_episode(index, text) for index in range(len(rewards))]
    results = tuple(
        SeatResult("ann", index, 0, SeatCredit(reward, Credit(individual=1.0))) for index, reward in enumerate(rewards)
    )
    # Times and updates are no concern of a log of episodes.
    return IterationReport(iteration, "competitive", played, Judgement((), results), {}, {}, None)  # type: ignore[arg-type]


def _episode(index: int, text: str) -> PlayedEpisode:
    plan = EpisodePlan(index, Lineup.alone(2), (ANN, BASE), index)
    turns = tuple(
        PlayedTurn(seat, player, (1,), (2, 3), text, np.zeros(2, np.float32), index != 2, f"question {index}")
        for seat, player in enumerate(plan.players)
    )
    return PlayedEpisode(plan, turns, made_outcome(plan.lineup, [1.0, 0.25], [1.0, 0.5]), f"q{index}")


def log(folder: Path, per_iteration: int = 4, most_bytes: int = 1 << 20, iteration: int = 0) -> EpisodeLog:
    section = EpisodesSection(per_iteration=per_iteration, megabytes=most_bytes / (1 << 20))
    return EpisodeLog(folder / "episodes.jsonl", section, 5, iteration)


def iterations(folder: Path) -> list[int]:
    return [row["iteration"] for row in read_episodes(folder / "episodes.jsonl")]


def test_a_row_says_who_saw_and_said_what_and_what_it_was_worth(tmp_path: Path) -> None:
    log(tmp_path).write(made_report())
    row = next(row for row in read_episodes(tmp_path / "episodes.jsonl") if row["chosen"] == "lowest")
    assert (row["iteration"], row["mode"], row["episode"], row["question"], row["completed"]) == (
        *(7, "competitive", 1, "q1"),
        True,
    )
    ann, base = row["seats"]
    assert (ann["policy"], ann["version"], ann["score"], ann["valid"], ann["reward"]) == ("ann", 3, 1.0, 1.0, -1.0)
    assert (base["policy"], base["version"], base["score"], base["valid"], base["reward"]) == (
        *("base", -1, 0.25, 0.5),
        None,
    )
    assert ann["turns"] == [{"saw": "question 1", "said": "9", "tokens": 2, "ended": True, "cut": False}]


def test_the_extremes_are_kept_and_chance_decides_on_the_others_the_same_way_every_time() -> None:
    rewards = dict(enumerate(REWARDS))

    def chosen(count: int, seed: int = 0) -> list[tuple[int, str]]:
        return choose(rewards, count, np.random.default_rng(seed))

    assert chosen(1) == [(1, "lowest")]
    assert chosen(2) == [(1, "lowest"), (3, "highest")]
    assert chosen(4) == chosen(4)
    assert {index for seed in range(20) for index, _ in chosen(3, seed)} == set(rewards)
    assert sorted(index for index, _ in chosen(100)) == sorted(rewards)
    assert choose({}, 3, np.random.default_rng(0)) == []
    assert choose({0: 1.0, 1: 1.0}, 2, np.random.default_rng(0)) == [(0, "lowest"), (1, "drawn")]


def test_nothing_is_written_where_nothing_is_wanted(tmp_path: Path) -> None:
    log(tmp_path, per_iteration=0).write(made_report())
    assert list(tmp_path.iterdir()) == []


def test_the_file_stays_within_its_bound_and_the_newest_stay_in_it(tmp_path: Path) -> None:
    file, most = tmp_path / "episodes.jsonl", 20_000
    kept = log(tmp_path, most_bytes=most)
    for iteration in range(60):
        kept.write(made_report(iteration))
        assert file.stat().st_size <= most
        assert iterations(tmp_path)[-1] == iteration
    found = iterations(tmp_path)
    assert found == sorted(found)
    assert 0 < found[0] < 59
    assert [path.name for path in tmp_path.iterdir()] == ["episodes.jsonl"]


def test_an_iteration_too_large_for_the_bound_is_cut_to_it_and_a_long_text_to_its_beginning(tmp_path: Path) -> None:
    kept = log(tmp_path, most_bytes=30_000)
    for iteration in range(2):
        kept.write(made_report(iteration, text="x" * 50_000))
    rows = read_episodes(tmp_path / "episodes.jsonl")
    assert 0 < len(rows) < 4
    assert {row["iteration"] for row in rows} == {1}
    assert rows[0]["seats"][0]["turns"][0]["cut"]
    assert len(rows[0]["seats"][0]["turns"][0]["said"]) == 4000


def test_a_resumed_run_has_no_doubled_and_no_half_rows(tmp_path: Path) -> None:
    first = log(tmp_path)
    for iteration in range(4):
        first.write(made_report(iteration))
    whole = (tmp_path / "episodes.jsonl").read_bytes()
    with (tmp_path / "episodes.jsonl").open("ab") as file:
        file.write(b'{"iteration": 4, "mode": "comp')
    (tmp_path / ".episodes.jsonl-0a1b2c3d").write_bytes(b"half a rewrite")
    second = log(tmp_path, iteration=2)
    assert iterations(tmp_path) == [0] * 4 + [1] * 4
    for iteration in range(2, 4):
        second.write(made_report(iteration))
    assert (tmp_path / "episodes.jsonl").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["episodes.jsonl"]


def test_a_run_begun_anew_forgets_the_episodes_of_the_one_before(tmp_path: Path) -> None:
    log(tmp_path).write(made_report())
    log(tmp_path)
    assert (tmp_path / "episodes.jsonl").read_bytes() == b""


def test_lines_of_something_else_are_left_out(tmp_path: Path) -> None:
    log(tmp_path).write(made_report())
    with (tmp_path / "episodes.jsonl").open("ab") as file:
        file.write(b'[1, 2]\n"text"\n{"iteration": 3}\nno json\n\xff\xfe\n')
    assert iterations(tmp_path) == [7] * 4


@pytest.fixture
def rows(tmp_path: Path) -> list[EpisodeRow]:
    kept = log(tmp_path, per_iteration=100)
    for iteration in range(3):
        kept.write(made_report(iteration))
    return read_episodes(tmp_path / "episodes.jsonl")


def places(rows: Sequence[EpisodeRow]) -> list[tuple[int, int]]:
    return [(row["iteration"], row["episode"]) for row in rows]


def test_the_newest_are_chosen_or_those_that_earned_least_or_most(rows: list[EpisodeRow]) -> None:
    assert places(select(rows, 2)) == [(2, 4), (2, 5)]
    assert places(select(rows, 4, "lowest")) == [(2, 1), (1, 1), (0, 1), (2, 5)]
    assert places(select(rows, 2, "highest")) == [(2, 3), (1, 3)]
    assert places(select(rows, 2, "highest", "ann", 0)) == [(0, 3), (0, 4)]
    assert len(select(rows, 100)) == len(rows) == 18


def test_of_a_policy_its_own_reward_counts_and_only_where_it_learned(rows: list[EpisodeRow]) -> None:
    bob = replace_seat(rows[0], 1, {"policy": "bob", "reward": 9.0})
    assert reward_of(bob) == pytest.approx((0.5 + 9.0) / 2)
    assert (reward_of(bob, "ann"), reward_of(bob, "bob")) == (0.5, 9.0)
    assert reward_of(rows[0], "base") is None
    assert places(select([*rows, bob], 5, "lowest", "bob")) == [(0, 0)]
    assert select(rows, 5, "highest", "base") == []
    assert len(select(rows, 5, "newest", "base")) == 5


def replace_seat(row: EpisodeRow, seat: int, values: Mapping[str, object]) -> EpisodeRow:
    changed: EpisodeRow = json.loads(json.dumps(row))
    changed["seats"][seat].update(values)  # type: ignore[typeddict-item]
    return changed


def test_any_text_comes_back_as_it_was(tmp_path: Path) -> None:
    text = "\x1b[2J\u202e\n\udc80\x9b 东京 \u2028"
    log(tmp_path).write(made_report(text=text))
    raw = (tmp_path / "episodes.jsonl").read_bytes()
    assert raw.isascii(), "nobody's terminal is touched by looking at the file"
    assert read_episodes(tmp_path / "episodes.jsonl")[0]["seats"][0]["turns"][0]["said"] == text


def test_an_iteration_in_which_nobody_earned_anything_has_no_episode(tmp_path: Path) -> None:
    report = made_report()
    log(tmp_path).write(replace(report, judged=Judgement((), ())))
    assert not (tmp_path / "episodes.jsonl").exists() or iterations(tmp_path) == []
