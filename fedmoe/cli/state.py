"""`fedmoe state`: verify."""

from __future__ import annotations

import typer

from fedmoe.cli.state_verify import verify

app = typer.Typer(help="Look after a coordinator's state directory.", no_args_is_help=True)
app.command()(verify)
