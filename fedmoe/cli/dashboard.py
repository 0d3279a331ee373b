"""`fedmoe dashboard`: runs of the arena in a browser, side by side, as they go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fedmoe.cli.output import CommandError, importing

if TYPE_CHECKING:
    from fedmoe.arena.run.episode_log import Order

_MOST_EPISODES = 50


def dashboard(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")] = 5005,
) -> None:
    """Show runs of the arena in a browser on this machine, live and side by side, until Ctrl-C."""
    missing = [str(run) for run in runs if not run.is_dir()]
    if missing:
        raise CommandError(f"{', '.join(missing)}: no such folder; pass folders of runs, such as runs/arena")
    from fedmoe.monitor.web.run_pages import RunPages, serve_runs
    from fedmoe.wire.http.serving import PortInUseError

    try:
        with importing("web"):
            serve_runs(RunPages(runs, _episodes), port, lambda url: print(f"The page of {len(runs)} run(s): {url}"))
    except PortInUseError as error:
        raise CommandError(str(error)) from error


def _episodes(run: Path, policy: str | None, order: str) -> Sequence[Mapping[str, object]]:
    from fedmoe.arena.run.episode_log import EPISODES, read_episodes, select

    chosen = select(read_episodes(run / EPISODES), _MOST_EPISODES, cast("Order", order), policy, None)
    return cast("Sequence[Mapping[str, object]]", chosen)
