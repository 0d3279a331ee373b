"""`fedmoe join`: exchange a join line for a token of this worker's own, then train as `fedmoe worker` does."""

from __future__ import annotations

import inspect
import re
import socket
from inspect import Parameter
from pathlib import Path
from typing import Annotated

import typer

from fedmoe.cli.joined import JoinLine, exchange
from fedmoe.cli.output import say
from fedmoe.cli.worker import worker
from fedmoe.config import PROCESSES, WorkerConfig
from fedmoe.runtime.config_file import made, using_file

_LONGEST_NAME = 63
# What the line says, and what would use the line up without training.
_NOT_HERE = ("coordinator_url", "token", "worker_id", "dry_run", "as_json")
_LINE = Annotated[
    str, typer.Argument(metavar="LINE", help="What the coordinator showed, fmj_...@HOST:PORT#FINGERPRINT.")
]
_ALLOW_HTTP = Annotated[
    bool, typer.Option("--allow-http", help="Join over http:// on another machine too, where others may read along.")
]
_WORKER_ID = Annotated[str | None, typer.Option(help="This worker's name. [default: of the machine and the specialty]")]


def join(
    line: str,
    allow_http: bool,
    worker_id: str | None,
    context: typer.Context,
    config: Path | None,
    **values: object,
) -> None:
    """Join a federation with the line that its coordinator showed, and train; the line works once, on one machine.

    It is exchanged for a token of this worker's own, kept in its --state-dir: the same command goes on later.
    """
    parsed = JoinLine.parse(line, allow_http)
    given = {name: value for name, value in values.items() if value is not None}
    name = worker_id or default_name(socket.gethostname(), str(values["specialty"]))
    # All that can be wrong with the options is told before the line is used.
    given |= {"coordinator_url": parsed.url, "worker_id": name}
    with using_file(config):
        configuration = made(WorkerConfig, given, PROCESSES)
    folder = Path(configuration.state_dir or f"runs/workers/{name}")
    joined, new = exchange(parsed, folder, name)
    if new:
        say(f"joined {joined.url.partition('#')[0]} as {name}; its own token is in {folder}, this line is used now")
    worker(context=context, config=config, coordinator_url=joined.url, token=joined.token, worker_id=name, **values)


def default_name(host: str, specialty: str) -> str:
    """A worker's name from its machine's name and its specialty."""
    machine = re.sub(r"[^A-Za-z0-9_-]+", "-", host.partition(".")[0]).strip("-_") or "worker"
    return f"{machine}-{specialty}"[:_LONGEST_NAME].strip("-_")


def _parameters() -> list[Parameter]:
    """Those of `fedmoe worker`, but with the line in the place of URL and token, and a name that need not be given."""
    own = {
        "line": Parameter("line", Parameter.KEYWORD_ONLY, annotation=_LINE),
        "worker_id": Parameter("worker_id", Parameter.KEYWORD_ONLY, annotation=_WORKER_ID, default=None),
        "allow_http": Parameter("allow_http", Parameter.KEYWORD_ONLY, annotation=_ALLOW_HTTP, default=False),
    }
    theirs = inspect.signature(worker).parameters
    kept = {name: option for name, option in theirs.items() if name not in _NOT_HERE}
    return [own["line"], own["worker_id"], *kept.values(), own["allow_http"]]


vars(join)["__signature__"] = inspect.Signature(_parameters())
