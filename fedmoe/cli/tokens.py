"""`fedmoe token`: make, list and revoke tokens."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from fedmoe.cli.options import AdminToken, AsJson, with_client
from fedmoe.cli.output import CommandError, show, show_json, show_table
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.administration import TokenInfo, TokenRequest

app = typer.Typer(help="Make, list and revoke tokens (needs an admin token).", no_args_is_help=True)

_WHOLE_HASH = 64
_SHOWN_HASH = 8


@app.command()
@with_client(AdminToken)
def create(
    api: CoordinatorClient,
    worker: Annotated[str | None, typer.Option(help="Only for this worker.")] = None,
    expert: Annotated[list[str] | None, typer.Option(help="Only for these experts, repeatable.")] = None,
    role: Annotated[str, typer.Option(help="worker, join or admin.")] = "worker",
    expires_in: Annotated[float | None, typer.Option(help="Seconds until it expires. \\[default: never]")] = None,
    label: Annotated[str, typer.Option(help="What people call it, shown in lists and logs.")] = "",
    as_json: AsJson = False,
) -> None:
    """Make a token; it is shown once."""
    fields = {"role": role, "worker": worker, "experts": expert, "expires_in": expires_in, "label": label}
    answer = api.make_token(TokenRequest.model_validate(fields))
    show(answer, as_json, f"token  {answer.token}", f"hash   {answer.hash}  (to revoke it)")


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
) -> None:
    """Refuse a token from now on, and stop what is under way with it."""
    api.revoke_token(token_hash if len(token_hash) >= _WHOLE_HASH else _completed(api, token_hash))
    print("revoked")


def _completed(api: CoordinatorClient, beginning: str) -> str:
    """The one hash that begins so."""
    if not set(beginning) <= set("0123456789abcdef"):
        # What was given may be a token: it is not shown.
        raise CommandError("that is no hash, of which every digit is 0-9 or a-f; 'fedmoe token list' shows the hashes")
    hashes = [info.hash for info in api.tokens().tokens if info.hash.startswith(beginning)]
    if len(hashes) != 1 or not beginning:
        raise CommandError(f"{len(hashes)} tokens have a hash that begins with {beginning!r}; see 'fedmoe token list'")
    return hashes[0]


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
