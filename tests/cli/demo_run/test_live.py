"""Live progress reads what workers write, also while they write it."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from structlog.testing import capture_logs

from fedmoe.cli.demo_run import live
from fedmoe.cli.demo_run.live import DemoView, sign_of_life
from fedmoe.cli.demo_run.plan import WORKERS, DemoPlan
from fedmoe.runtime.records import RecordWriter
from fedmoe.worker.report import PhaseLog, log_phase


def written(plan: DemoPlan, index: int) -> RecordWriter:
    return RecordWriter(plan.worker_dir(WORKERS[index]) / "metrics.jsonl")


def shown(plan: DemoPlan, then: Callable[[], None] = lambda: None) -> str:
    """What is shown last, of what there is and of what `then` adds."""
    out = io.StringIO()
    view = DemoView(plan, Console(file=out, force_terminal=False, width=200))
    then()
    with view:
        pass
    return out.getvalue()


def said(plan: DemoPlan, index: int, **told: object) -> None:
    """A line of a worker's log, as `fedmoe.worker.report` has it written."""
    file = plan.log(WORKERS[index])
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as log:
        log.write(json.dumps({"level": "info", **told}) + "\n")


def step(writer: RecordWriter, number: int) -> None:
    writer.write("step", step=number, loss=2.5, tokens_per_second=130.4, version=3, staleness=1)


def test_one_line_a_worker_with_step_loss_speed_version_and_staleness(tmp_path: Path) -> None:
    plan = DemoPlan(tmp_path, tmp_path / "data", steps=9)
    writer = written(plan, 0)
    step(writer, 1)
    step(writer, 2)
    writer.write("push", sequence=0)
    lines = shown(plan, lambda: said(plan, 0, event="phase", phase="training")).splitlines()
    assert len(lines) == len(WORKERS)
    for part in ("Worker-1-Python", "step 2/9", "loss 2.500", "tokens/s 130", "version 3", "staleness 1", "pushes 1"):
        assert part in lines[0]
    assert "step 0/9" in lines[1]


def test_before_the_first_step_the_phase_is_shown_with_how_far_it_is(tmp_path: Path) -> None:
    plan = DemoPlan(tmp_path, tmp_path / "data", steps=9)

    def start() -> None:
        said(plan, 0, event="phase", phase="loading the base model")
        said(plan, 1, event="phase", phase="preparing data", done=1200, total=4227)
        with plan.log(WORKERS[1]).open("a") as log:
            log.write("-- sample 1, what is learned --\n{not JSON\n")

    lines = shown(plan, start).splitlines()
    assert "phase loading the base model" in lines[0]
    assert "phase preparing data 1,200/4,227" in lines[1]
    assert "phase starting" in lines[2]


def test_the_phase_of_an_earlier_run_is_over(tmp_path: Path) -> None:
    plan = DemoPlan(tmp_path, tmp_path / "data", steps=9)
    step(written(plan, 0), 4)
    said(plan, 0, event="phase", phase="training")
    lines = shown(plan).splitlines()
    assert "phase starting" in lines[0]
    assert "step 4/9" in lines[0]


def test_what_is_done_beside_the_steps_hides_none_of_their_numbers(tmp_path: Path) -> None:
    plan = DemoPlan(tmp_path, tmp_path / "data", steps=9)
    metrics = written(plan, 0)
    with DemoView(plan, Console(file=(out := io.StringIO()), force_terminal=False, width=200)) as view:
        said(plan, 0, event="phase", phase="training")
        for number, phase in ((1, "statistics of the data"), (2, "held-out loss"), (3, None)):
            step(metrics, number)
            view.refresh(force=True)
            if phase is not None:
                said(plan, 0, event="phase", phase=phase, done=5, total=9)
                view.refresh(force=True)
        told = [line for line in out.getvalue().splitlines() if line.startswith("Worker-1")]
    phases = [line.split("phase ")[1].split("  step")[0] for line in told]
    assert phases == ["training", "statistics of the data 5/9", "training", "held-out loss 5/9", "training"]
    assert all("loss -" not in line for line in told)


def test_what_a_worker_logs_is_what_is_shown(tmp_path: Path) -> None:
    plan = DemoPlan(tmp_path, tmp_path / "data", steps=9)

    def start() -> None:
        with capture_logs() as lines:
            log_phase("preparing data", 1200)
            for done in range(7):
                PhaseLog("statistics of the data").update(done, 7)
        for line in lines[:1]:
            said(plan, 0, **line)
        for line in lines:
            said(plan, 1, **line)

    lines = shown(plan, start).splitlines()
    assert "phase preparing data 1,200  step" in lines[0]
    assert "phase statistics of the data 6/7" in lines[1]


def test_half_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    plan = DemoPlan(tmp_path, tmp_path / "data", steps=9)
    step(written(plan, 1), 4)
    path = plan.worker_dir(WORKERS[1]) / "metrics.jsonl"
    whole = path.read_bytes()
    out = io.StringIO()
    with DemoView(plan, Console(file=out, force_terminal=False, width=200)) as view:
        path.write_bytes(whole + whole[:20])
        view.refresh()
        with path.open("ab") as file:
            file.write(whole[20:].replace(b'"step": 4', b'"step": 5'))
    assert "step 5/9" in out.getvalue()


def test_a_long_wait_says_again_and_again_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "_PRINT_SECONDS", 0.01)
    out = io.StringIO()
    with sign_of_life(Console(file=out, force_terminal=False, width=200), "measuring") as update:
        wait_until(lambda: out.getvalue().count("measuring (") >= 2)
        update("gateway on sql")
        wait_until(lambda: "measuring: gateway on sql (" in out.getvalue())


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
