"""`fedmoe config`: what each process would run with and where each value comes from; a JSON Schema of the file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, cast

import typer
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from fedmoe.cli.options import AsJson
from fedmoe.cli.output import CommandError, show_json, show_table
from fedmoe.config import PROCESSES
from fedmoe.runtime.config_file import FileSource, configuration_file, is_secret, made, using_file, variables_of

app = typer.Typer(help="Look at the configuration, and where its values come from.", no_args_is_help=True)
_MASK = "********"
_UNSET = "(required)"


@app.command()
def show(
    process: Annotated[
        str | None, typer.Argument(help="One of coordinator, worker, evaluator, gateway. [default: all]")
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="The file to read.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print every value and its origin: environment, file or default; secrets are masked."""
    if process is not None and process not in PROCESSES:
        raise CommandError(f"no process {process!r}; choose one of {', '.join(PROCESSES)}")
    names = [process] if process is not None else list(PROCESSES)
    with using_file(config):
        file = configuration_file()
        resolved = {name: values_of(PROCESSES[name]) for name in names}
    if as_json:
        show_json({"file": None if file is None else str(file), "processes": resolved})
        return
    print(f"file: {file or 'none'}")
    for name, values in resolved.items():
        rows = [[key, entry["value"], entry["origin"]] for key, entry in values.items()]
        show_table(name, ["key", "value", "origin"], rows)


def values_of(kind: type[BaseSettings]) -> dict[str, dict[str, object]]:
    """Field -> value and origin; raises for values that the process itself would refuse."""
    try:
        made(kind, {}, PROCESSES)
    except ValidationError as error:
        # What is missing may still come from the command line.
        if any(problem["type"] != "missing" for problem in error.errors()):
            raise
    in_file = cast(dict[str, object], FileSource(kind, PROCESSES).toml_data)
    values: dict[str, dict[str, object]] = {}
    for name, field in kind.model_fields.items():
        variable = next((item for item in variables_of(kind, name) if item in os.environ), None)
        value, origin = (_UNSET, "") if field.is_required() else (field.default, "default")
        if variable is not None:
            value, origin = os.environ[variable], f"environment {variable}"
        elif name in in_file:
            value, origin = in_file[name], "file"
        values[name] = {"value": _MASK if is_secret(field) and value is not None else value, "origin": origin}
    return values


@app.command()
def schema(as_json: Annotated[bool, typer.Option("--json", help="JSON, as without it.")] = True) -> None:
    """Print a JSON Schema of the file, for editors that check and complete TOML."""
    show_json(file_schema())


def file_schema() -> dict[str, object]:
    """A JSON Schema: a section a process, every key optional, no other keys."""
    sections: dict[str, object] = {}
    for name, kind in PROCESSES.items():
        section = kind.model_json_schema()
        # Part of a configuration may come from elsewhere.
        section.pop("required", None)
        sections[name] = section
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "fedmoe.toml",
        "type": "object",
        "properties": sections,
        "additionalProperties": False,
    }
