"""`fedmoe token`: make, list and revoke tokens."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

import typer

from fedmoe.cli.options import AdminToken, AsJson, with_client
from fedmoe.cli.output import CommandError, say, show, show_json, show_table
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.administration import INVITE, JOIN_LINE_SECONDS, TokenAnswer, TokenInfo, TokenRequest
from fedmoe.wire.pin import join_line
from fedmoe.wire.python_client import whole_hash
from fedmoe.wire.transport import names_this_machine

app = typer.Typer(help="Make, list and revoke tokens (needs an admin token).", no_args_is_help=True)

_SHOWN_HASH = 8


@app.command()
@with_client(AdminToken)
def create(
    api: CoordinatorClient,
    worker: Annotated[str | None, typer.Option(help="Only for this worker.")] = None,
    expert: Annotated[list[str] | None, typer.Option(help="Only for these experts, repeatable.")] = None,
    join: Annotated[bool, typer.Option("--join", help="Make a line for `fedmoe join`; it works once.")] = False,
    role: Annotated[str, typer.Option(help="worker, join, viewer or admin.")] = "worker",
    expires_in: Annotated[
        float | None, typer.Option(help="Seconds until it expires. [default: never; a join line: 7 days]")
    ] = None,
    label: Annotated[str, typer.Option(help="What people call it, shown in lists and logs.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a token, or a line with which a machine joins; it is shown once."""
    if join:
        role, expires_in = _line_role(role), JOIN_LINE_SECONDS if expires_in is None else expires_in
    fields = {"role": role, "worker": worker, "experts": expert, "expires_in": expires_in, "label": label}
    answer = api.make_token(TokenRequest.model_validate(fields))
    if join:
        _show_line(api, answer, worker, expert, as_json)
        return
    show(answer, as_json, f"token  {answer.token}", f"hash   {answer.hash}  (to revoke it)")


def _line_role(role: str) -> str:
    if role != "worker":
        raise CommandError(f"--join makes a line for a worker; drop --role {role}")
    return INVITE


def _show_line(
    api: CoordinatorClient, answer: TokenAnswer, worker: str | None, experts: list[str] | None, as_json: bool
) -> None:
    line = join_line(answer.token, api.url, api.fingerprint)
    specialty = experts[0] if experts is not None and len(experts) == 1 else "EXPERT"
    named = f" --worker-id {worker}" if worker is not None else ""
    command = f"fedmoe join {line} --specialty {specialty} --dataset FILE.jsonl{named}"
    if as_json:
        show_json({"line": line, "command": command, "hash": answer.hash})
        return
    say(command)
    say(f"hash   {answer.hash}  (to revoke it)")
    if names_this_machine(urlsplit(api.url).hostname or ""):
        say("note: this address is of this machine only; write the one that other machines use into the line")


@app.command("list")
@with_client(AdminToken)
def list_tokens(api: CoordinatorClient, as_json: AsJson = False) -> None:
    """Show all tokens: whose they are, what they may do, when they were used. What they are is not kept."""
    listing = api.tokens()
    if as_json:
        show_json(listing)
        return
    columns = ("hash", "label", "role", "for", "made", "last used", "state")
    show_table(f"Tokens of {api.url}", columns, [_row(info) for info in listing.tokens])


@app.command()
@with_client(AdminToken)
def revoke(
    api: CoordinatorClient,
    token_hash: Annotated[str, typer.Argument(help="The token's hash, or its beginning, as 'token list' shows it.")],
    as_json: AsJson = False,
) -> None:
    """Refuse a token from now on, and stop what is under way with it."""
    revoked = whole_hash(token_hash, lambda: api.tokens().tokens)
    api.revoke_token(revoked)
    if as_json:
        show_json({"hash": revoked, "revoked": True})
    else:
        print("revoked")


def _row(token: TokenInfo) -> tuple[str, ...]:
    experts = ", ".join(token.experts) if token.experts is not None else "all experts"
    source = f" from {token.used_from}" if token.used_from else ""
    return (
        token.hash[:_SHOWN_HASH],
        token.label,
        token.role,
        f"{token.worker or 'any worker'}, {experts}",
        _time(token.made_at, "unknown"),
        _time(token.used_at, "never") + source,
        _state(token),
    )


def _state(token: TokenInfo) -> str:
    if token.revoked:
        return "revoked"
    ended = token.expires_at is not None and token.expires_at <= time.time()
    if token.role == INVITE and not token.usable and (token.used_at is not None or not ended):
        return "used"
    if token.expires_at is None:
        return "usable"
    return f"{'usable until' if token.usable else 'expired at'} {_time(token.expires_at, '')}"


def _time(at: float | None, otherwise: str) -> str:
    if at is None:
        return otherwise
    try:
        return f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{at:g} s"
