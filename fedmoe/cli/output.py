"""What a command says: tables for people, JSON for programs, one clear line for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table

from fedmoe.errors import RefusedError

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 69


class CommandError(Exception):
    """A command cannot do what was asked; the message says why and what to do."""


def guarded(app: typer.Typer, arguments: list[str]) -> None:
    """Run an application; turn what may be expected to go wrong into one line on standard error and an exit status."""
    try:
        app(arguments)
    except ValidationError as error:
        _fail("\n".join(_option_problem(problem) for problem in error.errors()), EXIT_USAGE)
    except RefusedError as error:
        _fail(f"{error} [{error.code}]", EXIT_ERROR)
    except Exception as error:
        status = _expected_status(error)
        if status is None:
            raise
        _fail(str(error), status)


def _expected_status(error: Exception) -> int | None:
    """The exit status of an error that users meet; None for our own bugs, which show their traceback."""
    statuses = {
        "CommandError": EXIT_ERROR,
        "CoordinatorUnavailableError": EXIT_UNAVAILABLE,
        "StateDirError": EXIT_ERROR,
        "StorageFailedError": 74,
        "PortInUseError": 98,
        "DataError": EXIT_ERROR,
        "BaseModelError": EXIT_ERROR,
        "DeviceError": EXIT_ERROR,
        "TargetError": EXIT_ERROR,
        "ParallelError": EXIT_ERROR,
        "CheckpointError": EXIT_ERROR,
        "OutboxError": EXIT_ERROR,
        "WorkerFailedError": EXIT_ERROR,
        "FileExistsError": EXIT_ERROR,
        "FileNotFoundError": EXIT_ERROR,
        "PermissionError": EXIT_ERROR,
    }
    # By name, so that this table loads none of the heavy modules that define them.
    return next((statuses[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in statuses), None)


def _fail(message: str, status: int) -> None:
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(status)


def _option_problem(problem: Mapping[str, object]) -> str:
    place = problem["loc"]
    name = "--" + str(place[0]).lower().replace("_", "-") if isinstance(place, tuple) and place else "options"
    value = problem.get("input")
    shown = "" if isinstance(value, dict) or "token" in name else f", got {value!r}"
    return f"{name}: {str(problem['msg']).removeprefix('Value error, ')}{shown}"


def given(**options: object) -> dict[str, object]:
    """The options that were given on the command line; the others are left to environment variables and defaults."""
    return {name: value for name, value in options.items() if value is not None}


def show_json(value: BaseModel | Mapping[str, object] | Sequence[object]) -> None:
    """Print one JSON document on standard output."""
    content = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    print(json.dumps(content, indent=2, allow_nan=False))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on standard output."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    Console().print(table)
