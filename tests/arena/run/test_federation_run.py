"""A whole run in a federation, with its checkpoints on disk: killed, stopped, resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations, count
from pathlib import Path

import numpy as np
import pytest
from league_sites import ALPHA, RANK, House, Letters, running_house

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run import checkpoint
from fedmoe.arena.run.batched_records import BatchedRecords
from fedmoe.arena.run.options import RunOptions, Stop
from fedmoe.arena.run.run import run_arena
from fedmoe.lora.adapter import FloatVector
from fedmoe.runtime import failpoints
from fedmoe.runtime.records import Recorder, RecordValue


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with running_house(tmp_path / "coordinator") as running:
        yield running


class Killed(BaseException):
    """Stands for SIGKILL."""


@pytest.mark.parametrize(
    ("place", "time"), [("worker.cut", 4), ("league.answered", 4), ("league.recorded", 5), ("checkpoint.renamed", 1)]
)
def test_a_run_that_is_killed_and_resumed_pushes_nothing_twice(
    place: str, time: int, house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole run with its checkpoints on disk: the newest is of iteration 3, the kill in the exchange after 4."""
    monkeypatch.setattr("fedmoe.arena.run.run.make_task", lambda name, options: Letters())
    reached = count(1)

    def die(name: str) -> None:
        if name == place and next(reached) == time:
            raise Killed(name)

    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "reached", die)
        with pytest.raises(Killed):
            run_arena(run_config(house.url), options(tmp_path), Stop())
    assert run_arena(run_config(house.url), options(tmp_path, resume=True), Stop()).status == "finished"
    for name in ("solver", "critic"):
        updates = [update for update in house.updates() if update.expert == name]
        assert [update.sequence for update in updates] == list(range(len(updates)))
        assert 3 <= len(updates) <= 4
        for one, other in combinations([house.delta(update) for update in updates], 2):
            # From the same weights a resumed run learns the same again, bit for bit; nor may it take anything back.
            assert abs(np.dot(one, other)) < 0.9 * np.linalg.norm(one) * np.linalg.norm(other)
        np.testing.assert_allclose(house.weights(name), newest_checkpoint(tmp_path, name), atol=1e-6)


def options(tmp_path: Path, resume: bool = False) -> RunOptions:
    return RunOptions(tmp_path / "run", resume=resume, dtype="fp32", learner_device="cpu", rollout_device="cpu")


def run_config(url: str) -> ArenaConfig:
    return ArenaConfig.model_validate(
        {
            "base_model": "tiny",
            "phases": [{"mode": "competitive", "iterations": 6}],
            "task": {"name": "letters"},
            "policies": {"count": 2, "names": ["solver", "critic"], "rank": RANK, "alpha": ALPHA},
            "learning": {"groups": 2, "samples": 2},
            "evaluation": {"episodes": 2},
            "checkpoint": {"every": 3},
            "federation": {"url": url, "every": 2},
        }
    )


def newest_checkpoint(tmp_path: Path, name: str) -> FloatVector:
    found = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert found is not None
    versions = {key.partition("@")[2]: one for key, one in found.state.adapters.items() if key.startswith(f"{name}@")}
    return versions[max(versions, key=int)].flat


def test_a_run_that_is_stopped_hands_over_what_it_has(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.arena.run.run.make_task", lambda name, options: Letters())
    stop = Stop()

    @contextmanager
    def stop_in_the_third(records: BatchedRecords, folder: Path, limit: Callable[[], int]) -> Iterator[Recorder]:
        write = records.write

        def watched(kind: str, **values: RecordValue) -> None:
            if values.get("iteration") == 2:
                stop.ask("told to")
            write(kind, **values)

        monkeypatch.setattr(records, "write", watched)
        yield records

    assert run_arena(run_config(house.url), options(tmp_path), stop, stop_in_the_third).status == "stopped"
    assert house.version("solver") == 2  # after two iterations, and what the third brought
    assert run_arena(run_config(house.url), options(tmp_path, resume=True), Stop()).status == "finished"
    assert [update.sequence for update in house.updates() if update.expert == "solver"] == [0, 1, 2]
    np.testing.assert_allclose(house.weights("solver"), newest_checkpoint(tmp_path, "solver"), atol=1e-6)
