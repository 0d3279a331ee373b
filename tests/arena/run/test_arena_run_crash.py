"""A run killed at any moment and resumed is the run that was never killed, bit for bit (E13)."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena_process import ArenaProcess
from tiny_arena import curve, tiny_config

from fedmoe.arena.run import checkpoint
from fedmoe.arena.run.episode_log import EPISODES
from fedmoe.lora.codec import digest

PHASES = (("competitive", 5), ("team_battle", 4), ("cooperative", 5))


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[tuple[ArenaProcess, ArenaProcess]]:
    """One run that is never disturbed, and another of the same configuration."""
    config = tiny_config(PHASES, groups=1)
    both = ArenaProcess(tmp_path / "whole", config), ArenaProcess(tmp_path / "killed", config)
    yield both
    for one in both:
        one.end()


def digests(run: ArenaProcess) -> dict[str, str]:
    found = checkpoint.load_newest(run.folder / "checkpoints")
    assert found is not None
    return {key: digest(adapter) for key, adapter in found.state.adapters.items()}


def assert_same_run(killed: ArenaProcess, whole: ArenaProcess) -> None:
    assert curve(killed.folder) == curve(whole.folder)
    assert digests(killed) == digests(whole)
    assert (killed.folder / EPISODES).read_bytes() == (whole.folder / EPISODES).read_bytes()
    found = json.loads((killed.folder / "run_report.json").read_text())
    assert found["status"] == "finished"
    left = [path.name for path in killed.folder.rglob(".*")] + [path.name for path in killed.folder.glob("tmp")]
    assert left == [], "nothing half-written stays"


def kill_at_random_moments(run: ArenaProcess, kills: int, seed: int) -> None:
    """Kills while starting, sampling, learning, evaluating and saving, as chance has it."""
    moments = random.Random(seed)
    met = 0
    for attempt in range(3 * kills):
        told = run.told_size()
        run.start()
        if moments.random() < 0.75:
            run.wait_for_iteration(min(attempt % kills + 1, 12), told)
        time.sleep(moments.uniform(0, 0.25))
        met += run.kill()
        checkpoint.load_newest(run.folder / "checkpoints")  # raises when none is whole
        if met == kills:
            break
    assert met == kills, "the run was over too soon to be killed so often"
    run.finish()


def test_killed_three_times_the_run_is_the_same(runs: tuple[ArenaProcess, ArenaProcess]) -> None:
    whole, killed = runs
    whole.finish()
    kill_at_random_moments(killed, 3, seed=1)
    assert_same_run(killed, whole)


@pytest.mark.slow
def test_killed_twenty_times_the_run_is_the_same(tmp_path: Path) -> None:
    config = tiny_config([("competitive", 150), ("mixed", 150)], groups=1, adapt=True)
    whole, killed = ArenaProcess(tmp_path / "whole", config), ArenaProcess(tmp_path / "killed", config)
    try:
        whole.finish()
        kill_at_random_moments(killed, 20, seed=2)
        assert_same_run(killed, whole)
    finally:
        killed.end()
        whole.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_in_order_with_a_checkpoint(
    number: signal.Signals, runs: tuple[ArenaProcess, ArenaProcess]
) -> None:
    run, _ = runs
    process = run.start()
    run.wait_for_iteration(2, 0)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == 0, run.told()
    found = json.loads((run.folder / "run_report.json").read_text())
    assert (found["status"], found["reason"]) == ("stopped", "asked to stop by a signal")
    newest = checkpoint.load_newest(run.folder / "checkpoints")
    assert newest is not None
    assert newest.state.iteration == run.iterations()[-1] < 14
    assert found["checkpoints"][-1] == newest.path.name
    assert run.told().rstrip().endswith(f"stopped (asked to stop by a signal); everything is in {run.folder}")
