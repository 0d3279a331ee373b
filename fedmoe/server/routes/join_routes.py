"""HTTP route of a join line: its token is exchanged, once, for a worker's own."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from fedmoe.server.access.authentication import address_of
from fedmoe.server.access.security import JOIN_PATH, principal_of
from fedmoe.server.routes.app_state import parts_of
from fedmoe.wire.contract.administration import JoinAnswer, JoinRequest

router = APIRouter()


@router.post(JOIN_PATH)
async def join(request: Request, message: JoinRequest) -> JoinAnswer:
    principal = principal_of(request)
    principal.require_invite(message.worker)
    principal.named["named"] = message.token_hash[:12]
    exchange = parts_of(request).tokens.exchange
    address = address_of(request.scope)
    record = await run_in_threadpool(exchange, principal.token, message.token_hash, message.worker, address)
    experts = list(record.experts) if record.experts is not None else None
    return JoinAnswer(worker=message.worker, experts=experts)
