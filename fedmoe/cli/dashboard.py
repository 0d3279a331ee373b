"""`fedmoe dashboard`: runs of the arena in a browser, side by side, as they go on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fedmoe.cli.output import CommandError, importing

if TYPE_CHECKING:
    from fedmoe.arena.run.episode_log import Order
    from fedmoe.monitor.web.run_pages import EpisodeFilter
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes a free one.")]


def dashboard(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    port: Port = 5005,
) -> None:
    """Show runs of the arena in a browser on this machine, live and side by side, until Ctrl-C."""
    show_in_browser(runs, port)


def show_in_browser(runs: Sequence[Path], port: int) -> None:
    """Serve the page of these run folders until a signal."""
    missing = [str(run) for run in runs if not run.is_dir()]
    if missing:
        raise CommandError(f"{', '.join(missing)}: no such folder; pass folders of runs, such as runs/arena")
    from fedmoe.monitor.web.run_pages import RunPages, serve_runs
    from fedmoe.wire.http.serving import PortInUseError

    try:
        with importing("web"):
            pages = RunPages(runs, read_filtered)
            serve_runs(pages, port, lambda url: print(f"The page of {len(runs)} run(s): {url}", flush=True))
    except PortInUseError as error:
        raise CommandError(str(error)) from error


def read_filtered(run: Path, asked: EpisodeFilter) -> Sequence[Mapping[str, object]]:
    """The episodes of a run that a filter takes; raises FileNotFoundError where none were kept."""
    from fedmoe.arena.run.episode_log import EPISODES, read_episodes, reward_of, select

    rows = read_episodes(run / EPISODES)
    if asked.least is not None or asked.most is not None:
        least = -math.inf if asked.least is None else asked.least
        most = math.inf if asked.most is None else asked.most
        rewards = [reward_of(row, asked.policy) for row in rows]
        rows = [
            row for row, reward in zip(rows, rewards, strict=True) if reward is not None and least <= reward <= most
        ]
    limit = len(rows) if asked.limit is None else asked.limit
    return cast("Sequence[Mapping[str, object]]", select(rows, limit, cast("Order", asked.order), asked.policy))
