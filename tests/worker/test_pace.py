"""The pace of a worker, and what its log says of it at each sync."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fedmoe.qwen_worker import StepRecord
from fedmoe.wire.contract.messages import UpdateHeader, UpdateResult
from fedmoe.wire.delivery import DeliveryOutcome
from fedmoe.wire.outbox import PendingUpdate
from fedmoe.worker.pace import Pace
from fedmoe.worker.report import WorkerReport


def step(number: int, seconds: float = 2.0, tokens: int = 100) -> StepRecord:
    return StepRecord(number, 1.5, tokens, 0.1, 1e-3, seconds)


def test_nothing_is_known_before_the_first_step_and_no_end_without_one() -> None:
    pace = Pace(10)
    assert (pace.steps_per_second, pace.tokens_per_second, pace.seconds_left) == (None, None, None)
    endless = Pace()
    endless.add(step(3))
    assert (endless.steps_per_second, endless.tokens_per_second, endless.seconds_left) == (0.5, 50.0, None)


def test_the_rest_takes_as_long_as_the_last_steps_say() -> None:
    pace = Pace(10)
    pace.add(step(1))
    assert pace.seconds_left == 18.0
    for number in range(2, 9):
        pace.add(step(number, seconds=4.0, tokens=200))
    assert pace.seconds_left is not None
    assert 4.0 < pace.seconds_left <= 8.0
    assert pace.tokens_per_second == pytest.approx(50.0, rel=0.1)
    pace.add(step(12))
    assert pace.seconds_left == 0.0


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (10, {"step": 4, "steps": 10, "tokens_per_second": 50, "seconds_left": 12}),
        (None, {"step": 4, "tokens_per_second": 50}),
    ],
)
def test_a_sync_says_the_step_the_speed_and_the_end(tmp_path: Path, steps: int | None, told: dict[str, int]) -> None:
    report = WorkerReport(tmp_path, "w1", "law", steps)
    report.step(step(4), 1)
    header = UpdateHeader(expert="law", worker="w1", epoch="e1", sequence=0, base_version=0, loss=1.5)
    digest = "0" * 64
    result = UpdateResult(expert="law", version=1, gateway_version=1, staleness=0, coefficient=1.0, digest=digest)
    with capture_logs() as lines:
        report.answered(PendingUpdate(header, b"12345678", digest), DeliveryOutcome(result, None, None, 0.2))
    report.close()
    names = ("step", "steps", "tokens_per_second", "seconds_left")
    assert [{name: line[name] for name in names if name in line} for line in lines] == [told]


def test_a_long_measurement_of_the_held_out_loss_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("fedmoe.worker.report.time.monotonic", lambda: now)
    report = WorkerReport(tmp_path, "w1", "law")
    with capture_logs() as lines:
        for done in range(1, 5):
            now += 2.0
            report.measuring(done, 4)
    report.close()
    assert lines == [{"event": "phase", "log_level": "info", "phase": "held-out loss", "done": 3, "total": 4}]


def test_steps_show_that_training_goes_on_where_no_sync_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("fedmoe.worker.report.time.monotonic", lambda: now)
    report = WorkerReport(tmp_path, "w1", "law")
    at: list[float] = []
    for number in range(1, 301):
        now += 1.0
        with capture_logs() as lines:
            report.step(step(number, seconds=1.0), 1)
        at += [now - 100.0] * len(lines)
        assert all(line["event"] == "step" and line["step"] == number for line in lines)
    report.close()
    assert at == [1, 6, 16, 36, 76, 136, 196, 256]
