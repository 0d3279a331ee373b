"""HTTP routes of the quarantine: list, release, reject held updates."""

from __future__ import annotations

from fastapi import FastAPI, Request

from fedmoe.federation.events import UpdateHeld
from fedmoe.server.access.security import principal_of
from fedmoe.server.routes.app_state import service_of
from fedmoe.wire.contract.administration import HeldUpdateInfo, QuarantineListing, RejectRequest, ReleaseRequest
from fedmoe.wire.contract.messages import UpdateResult


def add_quarantine_routes(app: FastAPI) -> None:
    app.get("/quarantine")(quarantine)
    app.post("/quarantine/release")(release)
    app.post("/quarantine/reject", status_code=204)(reject)


def quarantine(request: Request) -> QuarantineListing:
    principal_of(request).require_admin()
    service = service_of(request)
    held = sorted(service.coordinator.quarantine.held.values(), key=lambda update: update.number)
    experts = service.coordinator.experts
    return QuarantineListing(held=[_info(update, experts[update.expert].title, service.now) for update in held])


def release(request: Request, message: ReleaseRequest) -> UpdateResult:
    principal_of(request).require_admin(held_update=str(message.number))
    return service_of(request).held.release(message.number)


def reject(request: Request, message: RejectRequest) -> None:
    principal_of(request).require_admin(held_update=str(message.number))
    service_of(request).held.reject(message.number, message.reason)


def _info(held: UpdateHeld, expert: str, now: float) -> HeldUpdateInfo:
    return HeldUpdateInfo(
        number=held.number,
        expert=expert,
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
