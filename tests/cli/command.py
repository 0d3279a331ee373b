"""Every command of the command line, and what running one gave."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import forks
import typer

from fedmoe.cli.commands import app
from fedmoe.cli.gateway import tool

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """Exit status, standard output and standard error of a command."""

    status: int
    out: str
    err: str


class Parameter(Protocol):
    """An option or argument, as typer holds it."""

    name: str
    opts: list[str]
    secondary_opts: list[str]
    param_type_name: str
    help: str | None


class Command(Protocol):
    """A command, or a group of commands."""

    params: list[Parameter]
    help: str | None

    def make_context(self, info_name: str, args: list[str], **extra: Any) -> typer.Context:
        """The context of a call, of which the help can be asked."""
        ...


def commands() -> Iterator[tuple[str, Command]]:
    """All commands and groups with their full names; `get_gateway_model.py` is the specification's own."""
    yield from _below("fedmoe", cast(Command, typer.main.get_command(app)))
    yield "get_gateway_model.py", cast(Command, typer.main.get_command(tool))


def _below(name: str, command: Command) -> Iterator[tuple[str, Command]]:
    yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from _below(f"{name} {word}", inner)


def option_lines() -> list[str]:
    """One line for every option and argument there is."""
    lines = []
    for name, command in commands():
        for parameter in command.params:
            spelt = parameter.opts + parameter.secondary_opts
            shown = " ".join(spelt) if parameter.param_type_name == "option" else parameter.name.upper()
            lines.append(f"{name}: {shown}")
    return sorted(lines)


def run_script(*arguments: str, environment: dict[str, str] | None = None) -> Outcome:
    """Run a script or module of the repository in a process of its own; what it loads itself is loaded already."""
    done = forks.run(*arguments, environment=_clean_environment() | (environment or {}), folder=ROOT)
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_command(*arguments: str, environment: dict[str, str]) -> Outcome:
    """Run `fedmoe`, called by that name, in a process of its own."""
    return run_code(
        f"import sys; sys.argv = {['fedmoe', *arguments]!r}; from fedmoe.cli import main; main()", environment
    )


def run_code(code: str, environment: dict[str, str] | None = None) -> Outcome:
    """Run Python code in a process that has loaded nothing before."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=_clean_environment() | (environment or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def _clean_environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDMOE_")}
    return kept | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}


if __name__ == "__main__":
    print("\n".join(option_lines()))
