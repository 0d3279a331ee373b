"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

import typer

from fedmoe.config import DEFAULT_PORT
from fedmoe.runtime.logs import quiet_retries
from fedmoe.wire.client import CoordinatorClient

DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"

CoordinatorUrl = Annotated[
    str, typer.Option("--coordinator-url", envvar="FEDMOE_COORDINATOR_URL", help="Where the coordinator listens.")
]
Token = Annotated[str | None, typer.Option("--token", envvar="FEDMOE_TOKEN", help="Token, where one is asked for.")]
#: Rolling back, retracting and making tokens; the administrator's variable wins over the workers' one.
AdminToken = Annotated[
    str | None,
    typer.Option("--token", envvar=["FEDMOE_ADMIN_TOKEN", "FEDMOE_TOKEN"], help="Admin token, where one is asked for."),
]
# Text, so that one place judges them, the one that loads the base model.
ChatTemplateFile = Annotated[
    str | None, typer.Option(metavar="FILE", help="Jinja file to use instead of the base model's chat template.")
]
ChatTemplateKwargs = Annotated[
    str | None, typer.Option(metavar="JSON", help='Arguments of the chat template, such as {"enable_thinking": false}.')
]
DataMap = Annotated[
    list[str] | None,
    typer.Option("--map", metavar="COLUMN=NAME", help="Take a column under another name, repeatable: question=prompt."),
]
LongRows = Annotated[
    str | None,
    typer.Option(help="Answers beyond --max-length: truncate (default), split into samples, or drop the row."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


def client(url: str, token: str | None) -> CoordinatorClient:
    """A client for a command: few tries, so that a wrong address is told soon."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise typer.BadParameter(
            f"expected a URL like http://192.168.1.100:5000, got {url!r}", param_hint="--coordinator-url"
        )
    quiet_retries()
    return CoordinatorClient(url, token, attempts=2)
