"""`fedmoe experts`, `rollback` and `retract`: list, make, rename, retire and undo."""

from __future__ import annotations

from typing import Annotated

import typer

from fedmoe.cli.options import DEFAULT_URL, AdminToken, AsJson, CoordinatorUrl, Token, with_client
from fedmoe.cli.output import CommandError, show, show_json, show_table
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.experts import ExpertInfo, ExpertListing, HeldOutInfo
from fedmoe.wire.contract.messages import ChangeResult

app = typer.Typer()
ExpertArgument = Annotated[str, typer.Argument(help="Which expert.")]
Reason = Annotated[str, typer.Option(help="Kept in the journal.")]


@app.callback(invoke_without_command=True)
def experts(
    context: typer.Context, coordinator_url: CoordinatorUrl = DEFAULT_URL, token: Token = None, as_json: AsJson = False
) -> None:
    """List, make, rename and retire experts; without a further word it lists them."""
    if context.invoked_subcommand is None:
        list_experts(coordinator_url, token, as_json)


@app.command("list")
@with_client()
def list_experts(api: CoordinatorClient, as_json: AsJson = False) -> None:
    """List every expert, its workers, and the gateway."""
    listing = api.list_experts(retired=True)
    show_listing(listing, as_json)


def show_listing(listing: ExpertListing, as_json: bool) -> None:
    """Print experts, workers and the gateway."""
    if as_json:
        show_json(listing)
        return
    rows = [(_named(e), e.version, e.rank, f"{e.parameters:,}", e.base, e.digest[:12]) for e in listing.experts]
    show_table("Experts", ("expert", "version", "rank", "parameters", "base model", "digest"), rows)
    workers = [
        (w.worker, e.name, w.updates, w.staleness, _loss(w.loss), _held_out(w.held_out), f"{w.seconds_ago:.0f} s")
        for e in listing.experts
        for w in e.workers
    ]
    if workers:
        show_table(
            "Workers", ("worker", "expert", "updates", "staleness", "loss", "held-out loss", "last update"), workers
        )
    for flag in [f"{w.worker} of {e.name}: {flag}" for e in listing.experts for w in e.workers for flag in w.flags]:
        print(f"LOOK AT {flag}")
    if listing.gateway is not None:
        sources = ", ".join(f"{name} v{version}" for name, version in listing.gateway.sources.items())
        row = (listing.gateway.version, listing.gateway.strategy, listing.gateway.rank, sources)
        show_table("Gateway", ("version", "strategy", "rank", "made of"), [row])
    else:
        print(
            "No gateway: it is switched off."
            if not listing.enable_gateway
            else "No gateway yet: no expert is registered."
        )


def _named(expert: ExpertInfo) -> str:
    """The name, with what it was called before and whether it is retired."""
    notes = [f"was {', '.join(expert.formerly)}"] if expert.formerly else []
    notes += ["retired"] if expert.retired else []
    return f"{expert.name} ({'; '.join(notes)})" if notes else expert.name


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _held_out(losses: HeldOutInfo | None) -> str:
    """First and newest loss, for example `1.9312 -> 1.2044 (step 150)`."""
    return "-" if losses is None else f"{_loss(losses.first)} -> {_loss(losses.loss)} (step {losses.step})"


@app.command()
@with_client()
def create(
    api: CoordinatorClient,
    names: Annotated[list[str], typer.Argument(help="Names of the experts to make.")],
    as_json: AsJson = False,
) -> None:
    """Make experts with the LoRA configuration of those there are (the first one is made by its first worker)."""
    manifest = api.federation().manifest
    if manifest is None:
        raise CommandError("this federation has no LoRA configuration yet; start its first worker instead")
    made = [api.register(name, "operator", manifest.manifest()) for name in names]
    if as_json:
        show_json([expert.model_dump(mode="json") for expert in made])
    else:
        for expert in made:
            print(f"{expert.name} is at version {expert.version}")


@app.command()
@with_client(AdminToken)
def rename(
    api: CoordinatorClient,
    expert: ExpertArgument,
    name: Annotated[str, typer.Argument(help="The name it goes by from now on.")],
    as_json: AsJson = False,
) -> None:
    """Give an expert another name; workers that still use the former one are served as before."""
    changed = api.rename_expert(expert, name)
    show(changed, as_json, f"{expert} is now {name}, at version {changed.version}")


@app.command()
@with_client(AdminToken)
def retire(api: CoordinatorClient, expert: ExpertArgument, reason: Reason = "", as_json: AsJson = False) -> None:
    """Take an expert out of the gateway and refuse its updates; what it is stays."""
    changed = api.retire_expert(expert, reason)
    show(changed, as_json, f"{expert} is retired, at version {changed.version}")


@app.command()
@with_client(AdminToken)
def unretire(api: CoordinatorClient, expert: ExpertArgument, as_json: AsJson = False) -> None:
    """Bring a retired expert back as it was."""
    changed = api.unretire_expert(expert)
    show(changed, as_json, f"{expert} is back, at version {changed.version}")


@app.command()
@with_client(AdminToken)
def rollback(
    api: CoordinatorClient,
    expert: ExpertArgument,
    to_version: Annotated[int, typer.Argument(help="The version whose content it gets.")],
    digest: Annotated[
        str | None, typer.Option(help="Its digest (12 digits or more): refused if that version is another one here.")
    ] = None,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Give an expert the content of an earlier version, as a new version."""
    _show_change(api.roll_back(expert, to_version, reason, digest), as_json)


@app.command()
@with_client(AdminToken)
def retract(
    api: CoordinatorClient,
    expert: ExpertArgument,
    worker: Annotated[str, typer.Argument(help="Whose updates to take out.")],
    erase: Annotated[
        bool,
        typer.Option(
            "--erase", help="Delete their bytes, and the statistics that the worker sent of its data, for good."
        ),
    ] = False,
    reason: Reason = "",
    as_json: AsJson = False,
) -> None:
    """Take all updates of one worker out of an expert, by replaying the journal without them."""
    _show_change(api.retract(expert, worker, reason, erase), as_json)


def _show_change(change: ChangeResult, as_json: bool) -> None:
    done = f"{change.expert} is now version {change.version}, {change.removed} updates fewer ({change.digest[:12]})"
    show(change, as_json, done, *([change.note] if change.note else []))
