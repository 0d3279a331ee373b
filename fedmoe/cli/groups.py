"""Groups of commands, with help that is cut nowhere: plain text, wrapped at the width of the terminal."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

# So that what says a command in short is its whole first sentence.
_NO_LIMIT = 10_000


class CommandGroup(TyperGroup):
    """A group whose help has the first sentence of every command whole."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a line or more for each command."""
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [(name, command.get_short_help_str(_NO_LIMIT)) for name, command in commands if command is not None]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
