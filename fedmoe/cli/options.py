"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from fedmoe.config import DEFAULT_PORT
from fedmoe.wire.client import CoordinatorClient

DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"

CoordinatorUrl = Annotated[
    str, typer.Option("--coordinator-url", envvar="FEDMOE_COORDINATOR_URL", help="Where the coordinator listens.")
]
Token = Annotated[str | None, typer.Option("--token", envvar="FEDMOE_TOKEN", help="Token, where one is asked for.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def client(url: str, token: str | None) -> CoordinatorClient:
    """A client for a command: few tries, so that a wrong address is told soon."""
    return CoordinatorClient(url, token, attempts=2)
