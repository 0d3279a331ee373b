"""Charts of an arena run: choose its records, draw them, and make sample records to draw."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from fedmoe.cli.output import CommandError, guarded, importing
from fedmoe.monitor.arena_series import ArenaSeries, NoRecordsError, arena_series
from fedmoe.monitor.sample_records import sample_records
from fedmoe.runtime.files import write_atomic
from fedmoe.runtime.records import read_records
from fedmoe.runtime.streams import printing_safely

#: Where runs keep their records: that of demo/start_training.sh in the current folder, that of `fedmoe arena train`.
RUN_RECORDS = (Path("metrics.jsonl"), Path("runs/arena/metrics.jsonl"))
SAMPLE_RECORDS = Path("runs/arena-sample/metrics.jsonl")
CHART_FOLDER = Path("visualization_outputs")


def write_sample(path: Path, policies: int, iterations: int, seed: int) -> int:
    """Write sample records over earlier ones; returns how many. Raises CommandError rather than touch a real run."""
    if path.exists() and not all(record.get("sample") is True for record in read_records(path)):
        raise CommandError(f"{path} holds the records of a real run and is left alone; choose another file with --out")
    records = sample_records(policies, iterations, seed, started=time.time() - 14.0 * iterations)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records).encode())
    return len(records)


def choose_records(named: Path | None) -> Path:
    """The file to draw from: the one that was given, else the latest real run's, else the sample data.

    Raises CommandError when there is none.
    """
    if named is not None and not named.is_file():
        raise CommandError(f"{named} is not there; pass the metrics.jsonl of a run with --records")
    runs = sorted((path for path in RUN_RECORDS if path.is_file()), key=lambda path: -path.stat().st_mtime)
    for path in (named, *runs, SAMPLE_RECORDS):
        if path is not None and path.is_file():
            return path
    raise CommandError(
        f"neither a run ({', '.join(map(str, RUN_RECORDS))}) nor {SAMPLE_RECORDS} is there; train first, or run: "
        "python demo/generate_test_data.py"
    )


def load_series(records: Path) -> ArenaSeries:
    """Everything a file of records says about a run; raises CommandError when it holds nothing to draw."""
    try:
        return arena_series(read_records(records))
    except NoRecordsError as error:
        raise CommandError(f"{records}: {error}") from error


def draw_charts(series: ArenaSeries, folder: Path) -> Iterator[Path]:
    """Draw the six charts and the interactive page of a run; yields each file once it is there, whole.

    Raises CommandError when matplotlib or plotly is not installed.
    """
    # Loaded here: drawing libraries take a second, and are an extra.
    with importing("charts"):
        from fedmoe.monitor.charts import arena_pictures
        from fedmoe.monitor.interactive.page import PAGE, dashboard_page, plotly_library

        library = plotly_library()
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in arena_pictures(series):
        write_atomic(folder / name, data, 0o644)
        yield folder / name
    write_atomic(folder / PAGE, dashboard_page(series, library).encode(), 0o644)
    yield folder / PAGE


def generate(
    out: Annotated[Path, typer.Option(help="File to write.")] = SAMPLE_RECORDS,
    policies: Annotated[int, typer.Option(min=1, max=8, help="How many made-up policies.")] = 4,
    iterations: Annotated[int, typer.Option(min=1, max=100_000, help="How many made-up iterations.")] = 120,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal curves.")] = 0,
) -> None:
    """Make sample records of an arena run, to see the charts; every record is marked as sample data."""
    print(f"wrote {write_sample(out, policies, iterations, seed)} sample records to {out}")


def visualise(
    records: Annotated[
        Path | None, typer.Option(help="metrics.jsonl of a run. [default: the latest run's, else sample data]")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the charts.")] = CHART_FOLDER,
) -> None:
    """Draw the charts of an arena run, and its interactive page."""
    source = choose_records(records)
    series = load_series(source)
    print(f"drawing {source} ({'SAMPLE DATA, and every chart says so' if series.facts.sample else 'a real run'})")
    for path in draw_charts(series, out):
        print(f"  {path}")


def run_script(command: Callable[..., None]) -> None:
    """Run `generate` or `visualise` as a program of its own, with this process's arguments."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    with printing_safely():
        guarded(app, sys.argv[1:])
