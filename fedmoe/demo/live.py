"""Live progress: one line a worker, redrawn on a terminal, printed now and then elsewhere."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from fedmoe.demo.plan import WORKERS, DemoPlan
from fedmoe.record import Record

_PRINT_SECONDS = 15.0
_COLUMNS = ("worker", "step", "loss", "tokens/s", "version", "staleness", "pushes")


class _Tail:
    """The newest step and the number of pushes in a metrics file that is being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._position = 0
        self._rest = b""
        self.step: Record | None = None
        self.pushes = 0

    def read(self) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = self._rest + file.read()
            self._position = file.tell()
        *lines, self._rest = data.split(b"\n")
        for line in lines:
            record = json.loads(line)
            if record["kind"] == "step":
                self.step = record
            self.pushes += record["kind"] == "push"


class LiveView:
    """Shows what the workers' records say; `refresh` is called a few times a second."""

    def __init__(self, plan: DemoPlan, console: Console) -> None:
        self._plan = plan
        self._console = console
        self._tails = {worker.name: _Tail(plan.worker_dir(worker) / "metrics.jsonl") for worker in WORKERS}
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
        for tail in self._tails.values():
            tail.read()
        if self._live is not None:
            self._live.update(self._table())
        elif force or time.monotonic() - self._printed >= _PRINT_SECONDS:
            self._printed = time.monotonic()
            for cells in self._rows():
                pairs = zip(_COLUMNS[1:], cells[1:], strict=True)
                self._console.print(
                    f"{cells[0]:16} " + "  ".join(f"{name} {cell}" for name, cell in pairs),
                    highlight=False,
                    soft_wrap=True,
                )

    def _table(self) -> Table:
        table = Table(*_COLUMNS)
        for row in self._rows():
            table.add_row(*row)
        return table

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for name, tail in self._tails.items():
            step = tail.step
            if step is None:
                rows.append((name, f"0/{self._plan.steps}", "-", "-", "-", "-", str(tail.pushes)))
                continue
            rows.append(
                (
                    name,
                    f"{step['step']}/{self._plan.steps}",
                    f"{step['loss']:.3f}",
                    f"{step['tokens_per_second'] or 0:.0f}",
                    str(step["version"]),
                    str(step["staleness"]),
                    str(tail.pushes),
                )
            )
        return rows
