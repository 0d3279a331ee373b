"""Live progress reads what workers write, also while they write it."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from fedmoe.demo.live import LiveView
from fedmoe.demo.plan import WORKERS, DemoPlan
from fedmoe.record import RecordWriter


def written(plan: DemoPlan, index: int) -> RecordWriter:
    return RecordWriter(plan.worker_dir(WORKERS[index]) / "metrics.jsonl")


def shown(plan: DemoPlan) -> str:
    out = io.StringIO()
    with LiveView(plan, Console(file=out, force_terminal=False, width=200)):
        pass
    return out.getvalue()


def step(writer: RecordWriter, number: int) -> None:
    writer.write("step", step=number, loss=2.5, tokens_per_second=130.4, version=3, staleness=1)


def test_one_line_a_worker_with_step_loss_speed_version_and_staleness(tmp_path: Path) -> None:
    plan = DemoPlan(tmp_path, tmp_path / "data", steps=9)
    writer = written(plan, 0)
    step(writer, 1)
    step(writer, 2)
    writer.write("push", sequence=0)
    lines = shown(plan).splitlines()
    assert len(lines) == len(WORKERS)
    for part in ("Worker-1-Python", "step 2/9", "loss 2.500", "tokens/s 130", "version 3", "staleness 1", "pushes 1"):
        assert part in lines[0]
    assert "step 0/9" in lines[1]


def test_half_a_line_is_read_once_it_is_whole(tmp_path: Path) -> None:
    plan = DemoPlan(tmp_path, tmp_path / "data", steps=9)
    step(written(plan, 1), 4)
    path = plan.worker_dir(WORKERS[1]) / "metrics.jsonl"
    whole = path.read_bytes()
    out = io.StringIO()
    with LiveView(plan, Console(file=out, force_terminal=False, width=200)) as view:
        path.write_bytes(whole + whole[:20])
        view.refresh()
        with path.open("ab") as file:
            file.write(whole[20:].replace(b'"step": 4', b'"step": 5'))
    assert "step 5/9" in out.getvalue()
