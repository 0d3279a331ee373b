"""`fedmoe quarantine`: list, release and reject updates that are held back."""

from __future__ import annotations

from typing import Annotated

import typer

from fedmoe.cli.options import DEFAULT_URL, AdminToken, AsJson, CoordinatorUrl, with_client
from fedmoe.cli.output import show, show_json, show_table
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.administration import QuarantineListing

app = typer.Typer()
HeldNumber = Annotated[int, typer.Argument(help="The number of the held update, as the list shows it.", min=1)]


@app.callback(invoke_without_command=True)
def quarantine(
    context: typer.Context,
    coordinator_url: CoordinatorUrl = DEFAULT_URL,
    token: AdminToken = None,
    as_json: AsJson = False,
) -> None:
    """List updates that are held back, release or reject them (needs an admin token)."""
    if context.invoked_subcommand is None:
        list_held(coordinator_url, token, as_json)


@app.command("list")
@with_client(AdminToken)
def list_held(api: CoordinatorClient, as_json: AsJson = False) -> None:
    """List the updates that wait, with the reason."""
    held = api.quarantine()
    if as_json:
        show_json(QuarantineListing(held=held))
        return
    if not held:
        print("No update is held.")
        return
    rows = [
        (u.number, u.expert, u.worker, u.sequence, f"{u.bytes:,}", f"{u.seconds_ago:.0f} s", u.reason) for u in held
    ]
    show_table("Held updates", ("number", "expert", "worker", "sequence", "bytes", "since", "reason"), rows)


@app.command()
@with_client(AdminToken)
def release(api: CoordinatorClient, number: HeldNumber, as_json: AsJson = False) -> None:
    """Let a held update land, as if it had arrived now."""
    result = api.release_held(number)
    show(result, as_json, f"{result.expert} is now version {result.version} (staleness {result.staleness})")


@app.command()
@with_client(AdminToken)
def reject(
    api: CoordinatorClient,
    number: HeldNumber,
    reason: Annotated[str, typer.Option(help="Kept in the journal, and told to the worker.")] = "",
    as_json: AsJson = False,
) -> None:
    """Never let a held update land, and delete its bytes; its worker is told."""
    api.reject_held(number, reason)
    if as_json:
        show_json({"number": number, "status": "rejected", "reason": reason})
    else:
        print(f"held update {number} was rejected")
