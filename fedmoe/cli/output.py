"""Output of commands: tables for people, JSON for programs, one clear line and an exit status for an error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache
from typing import TYPE_CHECKING, NoReturn

from typer.exceptions import TyperException
from typer.main import get_command

from fedmoe.runtime.errors import ExpectedError, RefusedError
from fedmoe.runtime.safe_text import inert

if TYPE_CHECKING:
    from pydantic import BaseModel

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 69
EXIT_DIVERGED = 70
EXIT_DEVICE = 71
EXIT_STORAGE = 74
EXIT_PORT_IN_USE = 98


class CommandError(ExpectedError):
    """A command cannot do what was asked; the message says why and what to do."""


@contextmanager
def importing(extra: str) -> Iterator[None]:
    """Import modules that need an extra of the package; where it is missing, CommandError says what to install."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CommandError(f"{error.name} is not installed; run: pip install 'fedmoe[{extra}]'") from error


#: An application with its options read from the signatures, which takes a while: once a process.
command_of = cache(get_command)


def guarded(command: Callable[..., int | None], arguments: list[str]) -> None:
    """Run a command; turn what may be expected to go wrong into one line on standard error and an exit status."""
    try:
        status = command(arguments, standalone_mode=False)
    except TyperException as error:
        _misused(error)
    except RefusedError as error:
        _fail(f"{error} [{error.code}]", EXIT_ERROR)
    except BrokenPipeError:
        raise  # a reader that went away is no error to be told of
    except Exception as error:
        _explain(error)
        raise
    if status:
        raise SystemExit(status)


def _explain(error: Exception) -> None:
    """End with what is said of an error that users meet; of our own bugs nothing, they show their traceback."""
    # What these need is loaded where one of them was raised.
    from pydantic import ValidationError

    from fedmoe.wire.answers import CoordinatorUnavailableError

    if isinstance(error, ValidationError):
        _fail("\n".join(_option_problem(problem) for problem in error.errors()), EXIT_USAGE)
    if isinstance(error, CoordinatorUnavailableError):
        hint = "check --coordinator-url and that the coordinator runs there"
        hint = "" if error.advised else f"; {hint}" if error.retry_after is None else "; try again"
        _fail(f"{error}{hint}", EXIT_UNAVAILABLE)
    status = _expected_status(error)
    if status is not None:
        _fail(str(error), status)


def _misused(error: TyperException) -> NoReturn:
    """A command line that cannot be read; without any arguments the help is the answer."""
    context = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        print(error.format_message())
        raise SystemExit(EXIT_USAGE)
    hint = f" (see: {context.command_path} --help)" if context is not None else ""
    _fail(" ".join(error.format_message().split()) + hint, error.exit_code)


def _expected_status(error: Exception) -> int | None:
    """The exit status of an error that users meet; None for our own bugs, which show their traceback."""
    failures = (
        *("StateDirError", "DataError", "OptionError", "LengthError", "BaseMismatchError", "TargetError"),
        *("ParallelError", "WorkerCheckpointError", "OutboxError", "WorkerFailedError", "ServeError", "BackendError"),
        *("ExportError", "KeyFileError", "ExpectedError", "OSError"),
    )
    statuses = dict.fromkeys(failures, EXIT_ERROR) | {
        "ConnectionSettingError": EXIT_USAGE,
        "DivergedError": EXIT_DIVERGED,
        "DeviceFailedError": EXIT_DEVICE,
        "StorageFailedError": EXIT_STORAGE,
        "MissingBlobError": EXIT_STORAGE,
        "CorruptBlobError": EXIT_STORAGE,
        "PortInUseError": EXIT_PORT_IN_USE,
    }
    # By name, so that this table loads none of the heavy modules that define them.
    return next((statuses[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in statuses), None)


def _fail(message: str, status: int) -> NoReturn:
    for line in message.splitlines():
        print(f"error: {inert(line)}", file=sys.stderr)
    raise SystemExit(status)


_MAY_HOLD_SECRETS = ("--database-url", "--blobs", "--coordinator-url", "--advertise")


def _option_problem(problem: Mapping[str, object]) -> str:
    """One line on one value; never one that may have a secret in it, and none that the message shows already."""
    place, message = problem["loc"], str(problem["msg"]).removeprefix("Value error, ")
    if not isinstance(place, tuple) or not place:
        return message
    field = str(place[0]).removeprefix("FEDMOE_").lower()
    name = "--" + {"experts": "expert"}.get(field, field).replace("_", "-")
    value = problem.get("input")
    secret = "token" in name or name in _MAY_HOLD_SECRETS
    hidden = isinstance(value, dict) or secret or repr(value) in message
    return f"{name}: {message}" + ("" if hidden else f", got {value!r}")


def show_json(value: BaseModel | Mapping[str, object] | Sequence[object]) -> None:
    """Print one JSON document on standard output."""
    content = value if isinstance(value, Mapping | Sequence) else value.model_dump(mode="json")
    # JSON escapes all other control characters; this one stands in texts only.
    print(json.dumps(content, indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


@contextmanager
def reserved_output(as_json: bool) -> Iterator[None]:
    """Where JSON was asked for, send what is printed meanwhile to standard error: the document stands alone."""
    if not as_json:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def show(answer: BaseModel, as_json: bool, *lines: str) -> None:
    """Print an answer as JSON for programs, or these lines for people."""
    if as_json:
        show_json(answer)
    else:
        for line in lines:
            say(line)


def say(text: str) -> None:
    """Print a line that may hold words of others: what a terminal might obey is shown as text."""
    print(inert(text))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on standard output."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=inert(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")  # a name that is cut names nothing
    for row in rows:
        # As text: brackets in a name are no markup.
        table.add_row(*(Text(inert(str(cell), keep="\n")) for cell in row))
    Console().print(table)
