"""A process killed while it saves leaves the checkpoints before it whole (E13)."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from checkpoint_states import assert_same, state
from forks import Fork
from structlog.testing import capture_logs

from fedmoe.arena.run.checkpoint import checkpoints, clean, load_newest

SAVER = """
import sys
from pathlib import Path
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


def start_saving(folder: Path, printed: Path, failpoints: str = "") -> Fork:
    environment = os.environ | {"FEDMOE_FAILPOINTS": failpoints, "OMP_NUM_THREADS": "1"}
    return Fork(["-c", SAVER, str(folder)], printed, printed.with_suffix(".err"), environment)


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
    folder, printed = tmp_path / "checkpoints", tmp_path / "printed"
    assert start_saving(folder, printed, place).wait(60) == -signal.SIGKILL
    assert printed.read_text() == "1\n"
    assert_the_newest_is_whole(folder, 1)
    left = len(list(folder.iterdir())) - len(checkpoints(folder))
    assert left == (0 if "renamed" in place else 1)
    clean(folder)
    assert sorted(entry.name for entry in folder.iterdir()) == [path.name for path in checkpoints(folder)]


def kill_at_random(folder: Path, times: int, seed: int) -> None:
    rng = random.Random(seed)
    for number in range(times):
        printed = folder / f"printed-{number}"
        process = start_saving(folder / "checkpoints", printed)
        while not (printed.exists() and printed.read_bytes().endswith(b"\n")):
            assert process.poll() is None, printed.with_suffix(".err").read_text()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.08))
        process.kill()
        process.wait()
        assert_the_newest_is_whole(folder / "checkpoints", int(printed.read_text().split()[-1]))


def test_killed_at_random_moments_a_run_always_finds_its_newest_checkpoint(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 4, seed=1)


@pytest.mark.slow
def test_killed_a_hundred_times_a_run_always_finds_its_newest_checkpoint(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 100, seed=2)
