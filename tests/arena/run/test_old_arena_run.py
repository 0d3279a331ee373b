"""A run that an earlier version stopped after its first iteration is taken up by this one and ends as planned."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from letters import LettersTask
from tiny_arena import tiny_config

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run import checkpoint
from fedmoe.arena.run.options import RunOptions, Stop
from fedmoe.arena.run.results import REPORT
from fedmoe.arena.run.run import run_arena

FIXTURE = Path(__file__).parents[2] / "fixtures" / "arena_b5c47da.tar.gz"


def config() -> ArenaConfig:
    made = tiny_config((("competitive", 2),), micro_batch_tokens=256)
    return made.model_copy(update={"policies": made.policies.model_copy(update={"rank": 1})})


def unpacked(folder: Path) -> Path:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "arena-run"


def test_its_checkpoint_is_whole_and_read_71(tmp_path: Path) -> None:
    (path,) = checkpoint.checkpoints(unpacked(tmp_path) / "checkpoints")
    state = checkpoint.load(path)
    assert state.iteration == 1
    assert {"ann@0", "bob@0", "cy@0", "dee@0"} <= set(map(str, state.adapters))


def test_the_run_goes_on_and_ends_71(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.arena.run.run.make_task", lambda name, options: LettersTask())
    folder = unpacked(tmp_path)
    options = RunOptions(folder, resume=True, rollout_device="cpu", learner_device="cpu", dtype="fp32")
    ending = run_arena(config(), options, Stop())
    assert ending.status == "finished"
    assert json.loads((folder / REPORT).read_text())["resumed_from"] == "checkpoint_20261130_135943"
