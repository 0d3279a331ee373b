"""`fedmoe plot`: a figure or table of runs, for papers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from fedmoe.cli.options import AsJson
from fedmoe.cli.output import CommandError, importing, show_json
from fedmoe.monitor.arena_series import KINDS, arena_series
from fedmoe.monitor.plot_series import PlotCurve, RunKind, arena_plot, csv_table, federation_plot
from fedmoe.runtime.files import write_atomic
from fedmoe.runtime.records import Record, read_records

_SUFFIXES = ("csv", "pdf", "png", "svg")
_JOURNAL, _METRICS = "journal.sqlite", "metrics.jsonl"


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders of arena runs, or of federations: a coordinator's, a worker's, a demo's."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .svg, .pdf, .png or .csv.")],
    as_json: AsJson = False,
) -> None:
    """Draw runs side by side: scores, rewards, KL and entropy of the arena, losses over time of a federation.

    The CSV has the same curves, a row a point. Needs the extra `charts`, but not for CSV.
    """
    suffix = out.suffix.removeprefix(".").lower()
    if suffix not in _SUFFIXES:
        raise CommandError(f"{out}: the suffix says what is written; use one of .{', .'.join(_SUFFIXES)}")
    kind, curves, sample = _curves(runs)
    if suffix == "csv":
        data = csv_table(kind, curves).encode()
    else:
        with importing("charts"):
            from fedmoe.monitor.charts.run_plot import run_figure
            from fedmoe.monitor.picture import picture
        data = picture(run_figure(kind, curves, sample), cast(Literal["pdf", "png", "svg"], suffix))
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, data, 0o644)
    if as_json:
        parts = [{"run": c.run, "measure": c.measure, "series": c.name, "points": len(c.x)} for c in curves]
        show_json({"file": str(out), "kind": kind, "sample": sample, "curves": parts})
    else:
        print(f"drew {out}: {len(curves)} curves of {len(runs)} run(s)")


def _curves(runs: Sequence[Path]) -> tuple[RunKind, list[PlotCurve], bool]:
    """What kind of runs these are, their curves, and whether any is sample data."""
    kinds: dict[Path, RunKind] = {}
    curves, sample = list[PlotCurve](), False
    for run, label in zip(runs, _labels(runs), strict=True):
        records = _records(run)
        arena = any(record.get("kind") in KINDS for record in records)
        kinds[run] = "arena" if arena else "federation"
        own = arena_plot(label, arena_series(records)) if arena else federation_plot(label, records)
        if not own:
            raise CommandError(f"{run}: nothing to draw yet, {len(records)} records and no score, reward or loss")
        curves += own
        sample |= any(record.get("sample") is True for record in records)
    if len(set(kinds.values())) > 1:
        named = ", ".join(f"{run} ({kind})" for run, kind in kinds.items())
        raise CommandError(f"runs of the arena and of federations do not share an axis: {named}; plot them apart")
    return next(iter(kinds.values())), curves, sample


def _labels(runs: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [run.absolute().parts for run in runs]
    if len(set(parts)) < len(parts):
        raise CommandError(f"a run is named twice: {', '.join(map(str, runs))}")
    count = next(n for n in range(1, max(map(len, parts)) + 1) if len({p[-n:] for p in parts}) == len(parts))
    return ["/".join(part[-count:]) for part in parts]


def _records(run: Path) -> list[Record]:
    """The records of a run: its own, those of the workers below it, or what its journal has of losses."""
    if not run.exists():
        raise CommandError(f"{run}: no such folder; pass the folder of a run, such as runs/arena or runs/coordinator")
    if (run / _JOURNAL).is_file():
        from fedmoe.server.history.loss_history import loss_records

        return loss_records(run)
    files = list(_record_files(run))
    if not files:
        raise CommandError(
            f"{run}: no run: neither {_METRICS} (of the arena, a worker, or a demo) nor {_JOURNAL} (of a coordinator) "
            "is there"
        )
    return [record for file in files for record in read_records(file)]


def _record_files(run: Path) -> Iterator[Path]:
    if run.is_file() or (run / _METRICS).is_file():
        yield run if run.is_file() else run / _METRICS
    else:
        # A demonstration puts them together at its end.
        yield from sorted(run.glob(f"workers/*/{_METRICS}"))
