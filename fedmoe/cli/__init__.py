"""The `fedmoe` command: the composition root.

What a process is given at its start, threads and standard output, is settled before the commands are imported: they
bring numpy, which keeps what it finds when it is loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fedmoe.runtime.streams import printing_safely
from fedmoe.runtime.threads import prepare_threads


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; expected errors end with one clear message and a non-zero status, never a traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    prepare_threads(words)
    with printing_safely():
        from fedmoe.cli.commands import app
        from fedmoe.cli.output import command_of, guarded

        guarded(command_of(app), words)


def get_gateway_model() -> None:
    """Run `get_gateway_model.py`, the specification's name for the gateway tool."""
    prepare_threads([])
    with printing_safely():
        from fedmoe.cli.gateway import tool
        from fedmoe.cli.output import command_of, guarded

        guarded(command_of(tool), sys.argv[1:])
