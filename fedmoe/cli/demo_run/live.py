"""Live progress of the demonstration: one line per worker, redrawn on a terminal, else printed periodically."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedmoe.cli.demo_run.plan import WORKERS, DemoPlan
from fedmoe.runtime.records import Record

_PRINT_SECONDS = 15.0
#: Before a worker logs anything, and once its steps are what there is to show.
STARTING, TRAINING = "starting", "training"
_COLUMNS = ("worker", "phase", "step", "loss", "tokens/s", "version", "staleness", "pushes")


class _Tail:
    """What is new in a file that is being written, line by line; half a line waits until it is whole."""

    def __init__(self, path: Path, position: int = 0) -> None:
        self._path = path
        self._position = position
        self._rest = b""

    def lines(self) -> list[bytes]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = self._rest + file.read()
            self._position = file.tell()
        *lines, self._rest = data.split(b"\n")
        return lines


class _WorkerProgress:
    """Progress of one worker: the phase that it logs, its newest step, the number of its pushes."""

    def __init__(self, records: Path, log: Path) -> None:
        self._records = _Tail(records)
        # What an earlier run of the same folder logged is over.
        self._log = _Tail(log, log.stat().st_size if log.exists() else 0)
        self.phase = STARTING
        self.step: Record | None = None
        self.pushes = 0

    def read(self) -> None:
        for line in self._records.lines():
            record = json.loads(line)
            if record["kind"] == "step":
                self.step = record
            self.pushes += record["kind"] == "push"
        for line in self._log.lines():
            self.phase = _phase(line) or self.phase


def _phase(line: bytes) -> str:
    """The phase that a line of a worker's log tells of; empty for any other line."""
    if not line.startswith(b"{"):
        return ""
    try:
        event = json.loads(line)
    except ValueError:
        return ""
    if event.get("event") != "phase":
        return ""
    done = f" {event['done']:,}" if "done" in event else ""
    total = f"/{event['total']:,}" if "total" in event else ""
    return f"{event['phase']}{done}{total}"


class DemoView:
    """Shows what the workers' records and logs say; `refresh` is called a few times a second.

    Made before the workers start: of their logs, what is there already is of an earlier run.
    """

    def __init__(self, plan: DemoPlan, console: Console) -> None:
        self._plan = plan
        self._console = console
        self._workers = {
            worker.name: _WorkerProgress(plan.worker_dir(worker) / "metrics.jsonl", plan.log(worker))
            for worker in WORKERS
        }
        self._live = Live(console=console, refresh_per_second=2) if console.is_terminal else None
        self._printed = 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh(force=True)
        if self._live is not None:
            self._live.stop()

    def refresh(self, force: bool = False) -> None:
        """Read what is new and show it."""
        for worker in self._workers.values():
            worker.read()
        if self._live is not None:
            table = Table(*_COLUMNS)
            for row in self._rows():
                table.add_row(*row)
            self._live.update(table)
        elif force or time.monotonic() - self._printed >= _PRINT_SECONDS:
            self._printed = time.monotonic()
            for cells in self._rows():
                pairs = zip(_COLUMNS[1:], cells[1:], strict=True)
                line = f"{cells[0]:16} " + "  ".join(f"{name} {cell}" for name, cell in pairs)
                self._console.print(line, highlight=False, soft_wrap=True)

    def _rows(self) -> Iterator[tuple[str, ...]]:
        for name, worker in self._workers.items():
            step, numbers = worker.step, ["-"] * 4
            done = step["step"] if step is not None else 0
            if step is not None and worker.phase == TRAINING:
                speed = f"{step['tokens_per_second'] or 0:.0f}"
                numbers = [f"{step['loss']:.3f}", speed, str(step["version"]), str(step["staleness"])]
            yield (name, worker.phase, f"{done}/{self._plan.steps}", *numbers, str(worker.pushes))
