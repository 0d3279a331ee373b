"""`fedmoe data`: build the demonstration's data, and check one's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmoe.cli.options import AsJson, ChatTemplateFile, ChatTemplateKwargs, DataMap, LongRows, template_of
from fedmoe.cli.output import CommandError, show_json, show_table

if TYPE_CHECKING:
    from fedmoe.datasets.report import DataReport
    from fedmoe.models.base import ChatTemplate
    from fedmoe.models.prepare_data import DataOptions

_SHOWN_FROM = 2_000

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

    from fedmoe.datasets.demo.domains import DOMAINS, build_domains

    say = (lambda _: None) if as_json else print
    made = build_domains(out, tuple(domains or DOMAINS), say, force=force, archives=archives)
    if as_json:
        show_json({name: asdict(summary) for name, summary in made.items()})
        return
    rows = [(n, s.train.rows, s.test.rows, s.train.files, s.test.files) for n, s in made.items()]
    show_table(f"Data in {out}", ("domain", "train rows", "test rows", "train files", "test files"), rows)


@app.command()
def check(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A data file, a folder of them, or a hub id.")],
    base_model: Annotated[
        str | None, typer.Option(help="Count tokens and show samples for smollm2, tiny, a folder or a hub id.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Tokens in a row. [default: 1024, or the model's context if shorter]")
    ] = None,
    map: DataMap = None,
    long_rows: LongRows = None,
    chat_template: ChatTemplateFile = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    as_json: AsJson = False,
) -> None:
    """Check data before training: what becomes of every row, what is learned, and which rows are bad and why.

    With a base model it is the report that a worker prints before its first step, two samples included.
    """
    from fedmoe.datasets.row_scan import RowOptions, check_file

    rows = RowOptions.mapping(map or ())
    if base_model is None:
        needing = {"--max-length": max_length, "--long-rows": long_rows, "--chat-template": chat_template}
        needing |= {"--chat-template-kwargs": chat_template_kwargs}
        if flag := next((flag for flag, value in needing.items() if value is not None), ""):
            raise CommandError(f"{flag} needs --base-model: without one there are no tokens to count")
        report = check_file(file, rows)
    else:
        chat = template_of(chat_template, chat_template_kwargs)
        from fedmoe.models.prepare_data import DataOptions

        report = _report_for(base_model, file, max_length, DataOptions.of(rows, long_rows), chat)
    if as_json:
        show_json(report.to_json())
    else:
        print(report.text, *report.previews, sep="\n")
    if report.problem:
        raise typer.Exit(1)


def _report_for(
    base_model: str, file: str, max_length: int | None, options: DataOptions, chat: ChatTemplate
) -> DataReport:
    from fedmoe.datasets.row_scan import check_beginning
    from fedmoe.models.base import load_tokenizer
    from fedmoe.models.prepare_data import prepare_samples
    from fedmoe.models.step_memory import resolve_max_length
    from fedmoe.runtime.cache import cache_folder
    from fedmoe.runtime.device import pin_threads

    check_beginning(file, options.rows)
    tokenizer, context = load_tokenizer(base_model, chat)
    length = resolve_max_length(max_length, context)
    cache = cache_folder("tokens")
    prepared = prepare_samples(
        file, tokenizer, length, options, cache=cache, processes=pin_threads(), progress=_show_progress, refuse=False
    )
    return prepared.report


def _show_progress(done: int) -> None:
    # A counter on one line for people; nothing in files and pipes.
    if sys.stderr.isatty() and done >= _SHOWN_FROM:
        print(f"\rtokenizing: {done:,} rows", end="", file=sys.stderr, flush=True)
