"""A process killed while it saves leaves the checkpoints before it whole (E13)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_states import assert_same, state
from structlog.testing import capture_logs

from fedmoe.arena.run.checkpoint import checkpoints, clean, load_newest

SAVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from checkpoint_states import saved
from fedmoe.runtime import logs
from fedmoe.arena.run.checkpoint import clean, load_newest, prune
logs.configure()
folder = Path(sys.argv[1])
clean(folder)
found = load_newest(folder)
iteration = found.state.iteration if found else 0
while True:
    iteration += 1
    path = saved(folder, iteration)
    print(iteration, flush=True)
    prune(folder, 3, in_use=path)
"""


def start_saving(folder: Path, failpoints: str = "") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SAVER, str(folder), str(Path(__file__).parents[1])],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"FEDMOE_FAILPOINTS": failpoints, "OMP_NUM_THREADS": "1"},
    )


def assert_the_newest_is_whole(folder: Path, promised: int) -> None:
    with capture_logs() as lines:
        found = load_newest(folder)
    assert lines == []
    assert found is not None
    assert promised <= found.state.iteration <= promised + 1
    assert_same(found.state, state(found.state.iteration))


@pytest.mark.parametrize(
    "place",
    ["checkpoint.file_written=11", "checkpoint.file_written=17", "checkpoint.written=2", "checkpoint.renamed=2"],
)
def test_killed_at_any_step_of_a_save_the_one_before_is_whole(place: str, tmp_path: Path) -> None:
    process = start_saving(tmp_path, place)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert printed == "1\n"
    assert_the_newest_is_whole(tmp_path, 1)
    left = len(list(tmp_path.iterdir())) - len(checkpoints(tmp_path))
    assert left == (0 if "renamed" in place else 1)
    clean(tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [path.name for path in checkpoints(tmp_path)]


def kill_at_random(folder: Path, times: int, seed: int) -> None:
    rng = random.Random(seed)
    promised = 0
    for _ in range(times):
        process = start_saving(folder)
        assert process.stdout is not None
        promised = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.08))
        process.kill()
        numbers = process.stdout.read().split()
        process.stdout.close()
        process.wait()
        promised = int(numbers[-1]) if numbers else promised
        assert_the_newest_is_whole(folder, promised)


def test_killed_at_random_moments_a_run_always_finds_its_newest_checkpoint(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 4, seed=1)


@pytest.mark.slow
def test_killed_a_hundred_times_a_run_always_finds_its_newest_checkpoint(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 100, seed=2)
