"""Live progress of the demonstration: one line per worker, redrawn on a terminal, else printed periodically."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedmoe.cli.demo_run.plan import WORKERS, DemoPlan
from fedmoe.runtime.periodic import repeated

# Elsewhere than on a terminal, something is said so often at least.
_PRINT_SECONDS = 5.0
#: Before a worker logs anything, and once its steps are what there is to show.
STARTING, TRAINING = "starting", "training"
_COLUMNS = ("worker", "phase", "step", "loss", "tokens/s", "version", "staleness", "pushes")


def _objects(path: Path, position: int = 0) -> Iterator[dict[str, Any] | None]:
    """JSON objects in a file that is being written, one by one; None at its end so far. Other lines are left out."""
    rest = b""
    while True:
        lines: list[bytes] = []
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                *lines, rest = (rest + file.read()).split(b"\n")  # half a line waits until it is whole
                position = file.tell()
        for line in lines:
            with suppress(ValueError):
                if isinstance(value := json.loads(line), dict):
                    yield value
        yield None


@contextmanager
def sign_of_life(console: Console, what: str) -> Iterator[Callable[[str], None]]:
    """Show that something is being done until it is: a spinner on a terminal, a line every few seconds elsewhere.

    Yields a function that says how far it is.
    """
    began, shown = time.monotonic(), [what]

    def say() -> None:
        console.print(f"  {shown[0]} ({time.monotonic() - began:.0f} s)", highlight=False, soft_wrap=True)

    def update(text: str) -> None:
        shown[0] = f"{what}: {text}"
        if spinner is not None:
            spinner.update(shown[0])

    spinner = console.status(what) if console.is_terminal else None
    with spinner if spinner is not None else repeated(say, _PRINT_SECONDS, "sign-of-life"):
        yield update


class _WorkerProgress:
    """Progress of one worker: the phase that it logs, its newest step, the number of its pushes."""

    def __init__(self, records: Path, log: Path) -> None:
        self._records = _objects(records)
        # What an earlier run of the same folder logged is over.
        self._log = _objects(log, log.stat().st_size if log.exists() else 0)
        self.phase = STARTING
        #: Whether training has begun; what is done beside it has phases too.
        self.trains = False
        self.step: dict[str, Any] | None = None
        self.pushes = 0

    def read(self) -> None:
        while (record := next(self._records)) is not None:
            if record["kind"] == "step":
                self.step = record
                self.phase = TRAINING if self.trains else self.phase
            self.pushes += record["kind"] == "push"
        while (event := next(self._log)) is not None:
            if event.get("event") == "phase":
                done = f" {event['done']:,}" if "done" in event else ""
                total = f"/{event['total']:,}" if "total" in event else ""
                self.phase = f"{event['phase']}{done}{total}"
                self.trains = self.trains or self.phase == TRAINING


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

    def __exit__(self, *_: object) -> None:
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
            if step is not None and worker.trains:
                speed = f"{step['tokens_per_second'] or 0:.0f}"
                numbers = [f"{step['loss']:.3f}", speed, str(step["version"]), str(step["staleness"])]
            yield (name, worker.phase, f"{done}/{self._plan.steps}", *numbers, str(worker.pushes))
