"""`fedmoe arena watch`: a run of the arena as it goes on, in the terminal or in a browser."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer

from fedmoe.cli.dashboard import Port, show_in_browser
from fedmoe.cli.output import CommandError

_POLL_SECONDS = 0.5


def watch(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")] = Path("runs/arena"),
    web: Annotated[bool, typer.Option("--web", help="In a browser on this machine instead of the terminal.")] = False,
    port: Port = 5005,
) -> None:
    """Show a run as it goes on, from its beginning, until Ctrl-C; `fedmoe dashboard` shows several."""
    if web:
        show_in_browser([run], port)
        return
    with suppress(KeyboardInterrupt):
        follow(run, lambda: False)


def follow(run: Path, ended: Callable[[], bool]) -> None:
    """Show the records of a run in the terminal, those that are there and those that come, until `ended`."""
    from rich.console import Console

    from fedmoe.monitor.terminal import TerminalView
    from fedmoe.runtime.records import RecordFile

    if not run.is_dir():
        raise CommandError(f"{run} is not there; pass the folder of a run, such as runs/arena")
    records, shown = RecordFile(run / "metrics.jsonl"), 0
    with ExitStack() as opened:
        view: TerminalView | None = None
        while True:
            there = records.all() if records.exists() else []
            if len(there) < shown:
                raise CommandError(f"{run} was begun anew; watch it again")
            for record in there[shown:]:
                if view is None and record.get("kind") == "run":
                    view = opened.enter_context(TerminalView(Console(), int(str(record.get("iterations") or 0))))
                if view is not None and isinstance(record.get("kind"), str):
                    view.write(record)
            shown = len(there)
            if ended():
                return
            time.sleep(_POLL_SECONDS)
