"""HTTP routes of tokens: list, make, revoke; for administrators."""

from __future__ import annotations

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool

from fedmoe.server.access.security import principal_of
from fedmoe.server.access.tokens import TokenEntry
from fedmoe.server.routes.app_state import parts_of
from fedmoe.wire.contract.administration import RevokeRequest, TokenAnswer, TokenInfo, TokenListing, TokenRequest
from fedmoe.wire.http.bearer import new_token


def add_token_routes(app: FastAPI) -> None:
    app.get("/tokens")(list_tokens)
    app.post("/tokens")(make_token)
    app.post("/tokens/revoke", status_code=204)(revoke_token)


def list_tokens(request: Request) -> TokenListing:
    principal_of(request).require_admin()
    return TokenListing(tokens=[_info(token) for token in parts_of(request).tokens.known()])


async def make_token(request: Request, message: TokenRequest) -> TokenAnswer:
    principal = principal_of(request)
    principal.require_admin(named_label=message.label, worker=message.worker or "")
    token = new_token()
    scope = (message.role, message.worker, message.experts, message.expires_in, message.label)
    record = await run_in_threadpool(parts_of(request).tokens.add, token, *scope)
    principal.named["named"] = record.hash[:12]
    return TokenAnswer(token=token, hash=record.hash)


async def revoke_token(request: Request, message: RevokeRequest) -> None:
    principal_of(request).require_admin(named=message.hash[:12])
    await run_in_threadpool(parts_of(request).tokens.revoke, message.hash)


def _info(token: TokenEntry) -> TokenInfo:
    record, facts = token.record, token.facts
    return TokenInfo(
        hash=record.hash,
        label=facts.label,
        role=record.role,
        worker=record.worker,
        experts=list(record.experts) if record.experts is not None else None,
        origin=facts.origin,
        made_at=facts.made_at,
        used_at=facts.used_at,
        used_from=facts.used_from,
        expires_at=record.expires_at,
        revoked=record.revoked,
        usable=token.usable,
    )
