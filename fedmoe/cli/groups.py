"""Groups of commands: each command is made when it is called, and help is cut nowhere, plain text as wide as the
terminal.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

# So that what says a command in short is its whole first sentence.
_NO_LIMIT = 10_000


@dataclass(frozen=True, slots=True)
class Place:
    """Where a command or group lies, `module:name` below `fedmoe.cli`, and what it does in one sentence."""

    target: str
    summary: str

    @property
    def module(self) -> str:
        """The module to import for it."""
        return f"fedmoe.cli.{self.target.partition(':')[0]}"


class Commands(Mapping[str, Any]):
    """Commands by name; one is made, and its module imported, when it is first asked for."""

    def __init__(self, places: Mapping[str, Place]) -> None:
        self.places = places
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            place = self.places[name]
            self._made[name] = _command(name, getattr(import_module(place.module), place.target.partition(":")[2]))
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def _command(name: str, target: Any) -> Any:
    """A function with options, or an application with commands, as a command of this name."""
    holder = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)
    holder.callback()(lambda: None)
    if isinstance(target, typer.Typer):
        holder.add_typer(target, name=name, cls=CommandGroup)
    else:
        holder.command(name)(target)
    group: Any = get_command(holder)
    return group.commands[name]


class CommandGroup(TyperGroup):
    """A group whose help has the first sentence of every command whole."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names in the order of the help; none is made for it."""
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a line or more for each command."""
        commands: Any = self.commands
        if isinstance(commands, Commands):
            rows = [(name, place.summary) for name, place in commands.places.items()]
        else:
            rows = [(name, command.get_short_help_str(_NO_LIMIT)) for name, command in commands.items()]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
