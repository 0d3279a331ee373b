"""`fedmoe token`."""

from __future__ import annotations

from typing import Annotated

import typer

from fedmoe.cli.options import DEFAULT_URL, AdminToken, AsJson, CoordinatorUrl, client
from fedmoe.cli.output import show_json
from fedmoe.wire.messages import TokenRequest

app = typer.Typer(help="Make and revoke tokens (needs an admin token).", no_args_is_help=True)


@app.command()
def create(
    worker: Annotated[str | None, typer.Option(help="Only for this worker.")] = None,
    expert: Annotated[list[str] | None, typer.Option(help="Only for these experts, repeatable.")] = None,
    role: Annotated[str, typer.Option(help="worker, join or admin.")] = "worker",
    expires_in: Annotated[float | None, typer.Option(help="Seconds until it expires. [default: never]")] = None,
    coordinator_url: CoordinatorUrl = DEFAULT_URL,
    token: AdminToken = None,
    as_json: AsJson = False,
) -> None:
    """Make a token; it is shown once."""
    request = TokenRequest.model_validate({"role": role, "worker": worker, "experts": expert, "expires_in": expires_in})
    with client(coordinator_url, token) as api:
        answer = api.make_token(request)
    if as_json:
        show_json(answer)
    else:
        print(f"token  {answer.token}\nhash   {answer.hash}  (to revoke it)")


@app.command()
def revoke(
    token_hash: Annotated[str, typer.Argument(help="The hash shown when the token was made.")],
    coordinator_url: CoordinatorUrl = DEFAULT_URL,
    token: AdminToken = None,
) -> None:
    """Refuse a token from now on."""
    with client(coordinator_url, token) as api:
        api.revoke_token(token_hash)
    print("revoked")
