"""HTTP routes for administrators: tokens are listed, made and revoked, held updates listed, released and rejected."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool

from fedmoe.server.access.security import principal_of
from fedmoe.server.routes.app_state import parts_of, service_of
from fedmoe.wire.contract.administration import (
    INVITE,
    HeldUpdateInfo,
    QuarantineListing,
    RejectRequest,
    ReleaseRequest,
    RevokeRequest,
    TokenAnswer,
    TokenListing,
    TokenRequest,
)
from fedmoe.wire.contract.messages import UpdateResult
from fedmoe.wire.http.bearer import new_token

router = APIRouter()


@router.get("/tokens")
def list_tokens(request: Request) -> TokenListing:
    principal_of(request).require_admin()
    return TokenListing(tokens=parts_of(request).tokens.listed())


@router.post("/tokens")
async def make_token(request: Request, message: TokenRequest) -> TokenAnswer:
    principal = principal_of(request)
    principal.require_admin(named_label=message.label, worker=message.worker or "")
    token = new_token("fmj" if message.role == INVITE else "fmt")
    scope = (message.role, message.worker, message.experts, message.expires_in, message.label)
    record = await run_in_threadpool(parts_of(request).tokens.add, token, *scope)
    principal.named["named"] = record.hash[:12]
    return TokenAnswer(token=token, hash=record.hash)


@router.post("/tokens/revoke", status_code=204)
async def revoke_token(request: Request, message: RevokeRequest) -> None:
    principal_of(request).require_admin(named=message.hash[:12])
    await run_in_threadpool(parts_of(request).tokens.revoke, message.hash)


@router.get("/quarantine")
def quarantine(request: Request) -> QuarantineListing:
    principal_of(request).require_admin()
    service = service_of(request)
    experts, now = service.coordinator.experts, service.now
    return QuarantineListing(
        held=[
            HeldUpdateInfo(
                number=held.number,
                expert=experts[held.expert].title,
                worker=held.worker,
                epoch=held.epoch,
                sequence=held.sequence,
                base_version=held.base_version,
                digest=held.digest,
                bytes=held.size,
                norm=held.info.get("norm"),
                reason=held.reason,
                at=held.at,
                seconds_ago=max(0.0, now - held.at),
            )
            for held in sorted(service.coordinator.quarantine.held.values(), key=lambda update: update.number)
        ]
    )


@router.post("/quarantine/release")
def release(request: Request, message: ReleaseRequest) -> UpdateResult:
    principal_of(request).require_admin(held_update=str(message.number))
    return service_of(request).intake.release(message.number)


@router.post("/quarantine/reject", status_code=204)
def reject(request: Request, message: RejectRequest) -> None:
    principal_of(request).require_admin(held_update=str(message.number))
    service_of(request).intake.reject(message.number, message.reason)
