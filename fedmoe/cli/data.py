"""`fedmoe data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedmoe.cli.options import AsJson
from fedmoe.cli.output import show_json, show_table

app = typer.Typer(help="Make the demo's data, and check your own.", no_args_is_help=True)


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("data/demo"),
    domains: Annotated[list[str] | None, typer.Option("--domain", help="python, sql or docs. [default: all]")] = None,
    force: Annotated[bool, typer.Option("--force", help="Build anew what is there.")] = False,
    archives: Annotated[Path | None, typer.Option(help="Folder that already holds the source archives.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make the three demo domains from what packages ship: Python, SQL and documentation."""
    from dataclasses import asdict

    from fedmoe.datasets.domains import DOMAINS, build_domains

    say = (lambda _: None) if as_json else print
    made = build_domains(out, tuple(domains or DOMAINS), say, force=force, archives=archives)
    if as_json:
        show_json({name: asdict(summary) for name, summary in made.items()})
        return
    rows = [(n, s.train.rows, s.test.rows, s.train.files, s.test.files) for n, s in made.items()]
    show_table(f"Data in {out}", ("domain", "train rows", "test rows", "train files", "test files"), rows)


@app.command()
def check(
    file: Annotated[Path, typer.Argument(help="A data file, a folder of them, or a hub id.")], as_json: AsJson = False
) -> None:
    """Check a file before training: what format it has, and which lines are bad and why."""
    from fedmoe.datasets.check import check_file

    report = check_file(file)
    if as_json:
        show_json(report.to_json())
    else:
        print(report.text)
    if report.problem:
        raise typer.Exit(1)
