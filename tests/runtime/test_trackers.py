"""Trackers get the numbers of records; small modules of the same functions stand for them, and real ones where there.

The real ones are no part of a development installation: each wants much of its own.
"""

from __future__ import annotations

import json
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from fedmoe.runtime.records import Record, RecordWriter, read_records
from fedmoe.runtime.sinks import WatchedWriter
from fedmoe.runtime.trackers import TrackerError, open_trackers

ARENA: tuple[Record, ...] = (
    {"at": 1.0, "kind": "run", "task": "t", "seed": 3},
    {"at": 2.0, "kind": "policy", "policy": "a@1", "iteration": 4, "reward": 0.5, "kl": None, "entropy": 1e300},
    {"at": 2.0, "kind": "team", "iteration": 5, "completion": 1.0, "score": float("inf")},
    {"at": 3.0, "kind": "system", "cpu_percent": 50.0},
    {"at": 4.0, "kind": "team", "iteration": 3, "completion": float("nan"), "score": 10**30},
)
#: The numbers of those that are finite, at their iteration or the newest before.
SENT = [
    ({"policy/reward/a@1": 0.5, "policy/entropy/a@1": 1e300}, 4),
    ({"team/completion": 1.0}, 5),
    ({"system/cpu_percent": 50.0}, 5),
    ({"team/score": 1e30}, 3),
]
NAMES = ("trackio", "wandb", "mlflow")


class Kept:
    """What a tracker was told."""

    def __init__(self) -> None:
        self.opened: list[dict[str, object]] = []
        self.logged: list[tuple[dict[str, float], int]] = []
        self.ended = 0

    def init(self, **settings: object) -> Kept:
        print("a line for people")
        self.opened.append(settings)
        return self

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        values = dict(values)
        self.logged.append((values, int(values.pop("step")) if step is None else step))

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def finish(self) -> None:
        self.ended += 1


class KeptByMlflow(Kept):
    """The same behind MLflow's client."""

    def client(self, tracking_uri: str) -> KeptByMlflow:
        self.opened.append({"store": tracking_uri})
        return self

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str) -> str:
        self.opened[-1]["project"] = name
        return "7"

    def create_run(self, experiment: str, run_name: str) -> object:
        assert experiment == "7"
        self.opened[-1]["name"] = run_name
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_batch(self, run: str, metrics: list[tuple[str, float, int, int]]) -> None:
        assert run == "r1"
        self.logged.append(({name: value for name, value, _, _ in metrics}, metrics[0][3]))

    def set_terminated(self, run: str) -> None:
        self.ended += 1


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Kept]:
    """Puts a small module in the place of a tracker."""
    monkeypatch.setenv("TRACKIO_DIR", "")
    for variable in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)

    def put(name: str) -> Kept:
        module: Any = ModuleType(name)
        kept = KeptByMlflow() if name == "mlflow" else Kept()
        module.init = kept.init
        if isinstance(kept, KeptByMlflow):
            module.MlflowClient, entities = kept.client, ModuleType("mlflow.entities")
            vars(entities)["Metric"] = lambda *values: values
            monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
        monkeypatch.setitem(sys.modules, name, module)
        return kept

    return put


@pytest.mark.parametrize("name", NAMES)
def test_every_finite_number_arrives_at_its_step(
    name: str, stand_in: Callable[[str], Kept], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = stand_in(name)
    (tracker,) = open_trackers(name, "run-1", tmp_path)
    for record in ARENA:
        tracker.write(record)
    tracker.close()
    sent = [({key.replace("@", "_"): value for key, value in row.items()}, at) for row, at in SENT]
    assert kept.logged == (sent if name == "mlflow" else SENT)
    assert (len(kept.opened), kept.ended) == (1, 1)
    assert (kept.opened[0]["project"], kept.opened[0]["name"]) == ("fedmoe", "run-1")
    # Standard output may belong to a JSON document.
    assert capsys.readouterr().out == ""


def test_the_numbers_of_a_worker_lie_over_its_steps(stand_in: Callable[[str], Kept], tmp_path: Path) -> None:
    kept = stand_in("trackio")
    (tracker,) = open_trackers("trackio", "w1", tmp_path)
    named = {"worker": "w1", "expert": "python"}
    tracker.write({"at": 1.0, "kind": "step", **named, "step": 7, "loss": 2.5, "staleness": 0})
    tracker.write({"at": 2.0, "kind": "push", **named, "sequence": 3, "version": 9, "digest": "ab"})
    tracker.write({"at": 3.0, "kind": "held_out", **named, "step": 8, "loss": 2.25})
    tracker.close()
    assert kept.logged == [
        ({"step/loss": 2.5, "step/staleness": 0.0}, 7),
        ({"push/version": 9.0}, 7),
        ({"held_out/loss": 2.25}, 8),
    ]


def test_several_are_named_with_commas_and_a_wrong_name_opens_none(
    stand_in: Callable[[str], Kept], tmp_path: Path
) -> None:
    first, second = stand_in("trackio"), stand_in("wandb")
    with pytest.raises(TrackerError, match="comet: no such tracker to report to; there are trackio, wandb, mlflow"):
        open_trackers("wandb,comet", "run", tmp_path)
    assert (first.opened, second.opened) == ([], [])
    for tracker in open_trackers("wandb, trackio,wandb", "run", tmp_path):
        tracker.close()
    assert (first.ended, second.ended) == (1, 1)
    assert open_trackers("", "run", tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_one_that_is_not_installed_says_what_to_install(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TrackerError, match=rf"pip install 'fedmoe\[{name}\]'"):
        open_trackers(name, "run", tmp_path)


def test_one_that_cannot_be_opened_is_an_error_and_the_others_are_ended(
    stand_in: Callable[[str], Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = stand_in("trackio"), stand_in("wandb")

    def init(**settings: object) -> None:
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    with pytest.raises(TrackerError, match="wandb cannot be opened: no API key configured"):
        open_trackers("trackio,wandb", "run", tmp_path)
    assert (first.ended, second.ended) == (1, 0)


def test_one_that_fails_or_hangs_does_not_end_a_run(
    stand_in: Callable[[str], Kept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record is kept at once, whatever the tracker does with it."""
    failing, hanging = stand_in("trackio"), stand_in("wandb")
    released, began = threading.Event(), threading.Event()

    def fail(values: dict[str, float], step: int) -> None:
        raise ConnectionError("gone")

    def hang(values: dict[str, float]) -> None:
        began.set()
        assert released.wait(60)

    monkeypatch.setattr(failing, "log", fail)
    monkeypatch.setattr(hanging, "log", hang)
    monkeypatch.setattr("fedmoe.runtime.trackers._SECONDS_TO_END", 0.05)
    monkeypatch.setattr("fedmoe.runtime.trackers._MOST_WAITING", 3)
    with capture_logs() as lines:
        trackers = open_trackers("trackio,wandb", "run", tmp_path)
        writer = WatchedWriter(RecordWriter(tmp_path / "metrics.jsonl"), trackers)
        writer.write("team", iteration=0, score=1.0)
        assert began.wait(60)
        trackers[0]._thread.join(60)
        for iteration in range(1, 6):
            writer.write("team", iteration=iteration, score=1.0)
        writer.close()
    released.set()
    reasons = [line["reason"] for line in lines if line["event"] == "monitor_failed"]
    assert reasons == ["gone", "wandb is too slow: 3 records wait"]
    assert len(list(read_records(tmp_path / "metrics.jsonl"))) == 6


def opened_for_real(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Report the records to the real package, on this machine only."""
    pytest.importorskip(name, reason=f"{name} is not installed")
    for variable in ("TRACKIO_PROJECT", "WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with capture_logs() as lines:
        (tracker,) = open_trackers(name, "run-1", folder)
        writer = WatchedWriter(RecordWriter(folder / "metrics.jsonl"), [tracker])
        for record in ARENA:
            values = {key: value for key, value in record.items() if key not in ("at", "kind")}
            writer.write(str(record["kind"]), **values)
        writer.close()
    assert lines == []


@pytest.mark.filterwarnings("default")
def test_trackio_has_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio import utils

    monkeypatch.setattr(utils, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio", raising=False)
    opened_for_real("trackio", tmp_path, monkeypatch)
    (file,) = (tmp_path / "trackio").glob("*.db")
    with closing(sqlite3.connect(file)) as store:
        rows = store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY id").fetchall()
    assert [(json.loads(metrics), step) for name, step, metrics in rows if name == "run-1"] == SENT


@pytest.mark.filterwarnings("default")
def test_wandb_has_a_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_for_real("wandb", tmp_path, monkeypatch)
    (file,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    names, deadline = (b"policy/reward/a@1", b"team/score", b"system/cpu_percent"), time.monotonic() + 60
    # Its own process writes the file, and may still do so when it has said that it is done.
    while not all(name in file.read_bytes() for name in names):
        assert time.monotonic() < deadline, file.read_bytes()
        time.sleep(0.05)


@pytest.mark.filterwarnings("default")
def test_mlflow_has_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened_for_real("mlflow", tmp_path, monkeypatch)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fedmoe")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run-1", "FINISHED")
    for values, step in SENT:
        for name, value in values.items():
            (found,) = client.get_metric_history(run.info.run_id, name.replace("@", "_"))
            assert (found.step, found.value) == (step, value)
