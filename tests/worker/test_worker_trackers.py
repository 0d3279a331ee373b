"""A worker's numbers go to the trackers that it is told; losses that are no numbers end nothing."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from structlog.testing import capture_logs

from fedmoe.qwen_worker import StepRecord
from fedmoe.runtime.records import read_records
from fedmoe.runtime.trackers import TrackerError
from fedmoe.worker.report import WorkerReport


def step(number: int, loss: float) -> StepRecord:
    return StepRecord(step=number, loss=loss, tokens=8, grad_norm=1e300, learning_rate=0.1, seconds=0.5)


def test_steps_reach_the_tracker_and_the_workers_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[dict[str, float], int]] = []
    opened: list[object] = []
    run = SimpleNamespace(log=lambda values, step: logged.append((values, step)), finish=lambda: opened.append("ended"))

    def init(project: str, name: str) -> SimpleNamespace:
        opened.append(name)
        return run

    module = ModuleType("trackio")
    vars(module)["init"] = init
    monkeypatch.setitem(sys.modules, "trackio", module)
    monkeypatch.setenv("TRACKIO_DIR", "")
    with capture_logs() as lines:
        report = WorkerReport(tmp_path, "w1", "law", report_to="trackio")
        report.step(step(1, math.nan), 0)
        report.step(step(2, 2.5), 0)
        report.close()
    assert [line for line in lines if line["event"] != "step"] == []
    assert opened == ["w1", "ended"]
    (first, at), (second, then) = logged
    assert (at, then) == (1, 2)
    assert "step/loss" not in first
    assert (first["step/grad_norm"], second["step/loss"]) == (1e300, 2.5)
    assert [record["loss"] for record in read_records(tmp_path / "metrics.jsonl")] == [None, 2.5]


def test_a_name_that_is_no_tracker_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrackerError, match="comet: no such tracker to report to"):
        WorkerReport(tmp_path, "w1", "law", report_to="comet")
