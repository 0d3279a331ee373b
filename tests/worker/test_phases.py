"""What a worker says it is busy with: every tenth of a phase, and not more."""

from __future__ import annotations

from structlog.testing import capture_logs

from fedmoe.worker.report import PhaseLog, log_phase


def test_each_tenth_of_a_phase_is_told_once() -> None:
    phase = PhaseLog("statistics of the data")
    with capture_logs() as lines:
        for done in range(1, 1001):
            phase.update(done, 1000)
    assert [line["done"] for line in lines] == [1, *range(100, 1001, 100)]
    assert {(line["event"], line["phase"], line["total"]) for line in lines} == {
        ("phase", "statistics of the data", 1000)
    }


def test_a_phase_of_unknown_length_says_only_how_much_is_done() -> None:
    with capture_logs() as lines:
        log_phase("loading the base model")
        log_phase("preparing data", 512)
    assert [line.get("done") for line in lines] == [None, 512]
    assert all("total" not in line for line in lines)
