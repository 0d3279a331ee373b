"""HTTP routes of several coordinators: who owns what; and, for replicas alone, whether an upload would be taken."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.security import OF_PEER, principal_of
from fedmoe.server.routes.app_state import parts_of, with_first_name
from fedmoe.server.statistics.data_statistics import body_limit
from fedmoe.server.updates.intake import update_limit
from fedmoe.wire.contract.messages import DataStatisticsHeader, UpdateHeader
from fedmoe.wire.contract.replicas import ReplicaListing, UploadLimit

router = APIRouter()


@router.get("/replicas")
async def replicas(request: Request) -> ReplicaListing:
    principal_of(request).require_admin()
    return ReplicaListing(owners=list(await run_in_threadpool(parts_of(request).owners)))


@router.get("/update_limit")
async def limit_of_update(request: Request, header: Annotated[UpdateHeader, Query()]) -> UploadLimit:
    _require_peer(request)
    principal, parts = principal_of(request), parts_of(request)
    principal.require_worker(header.worker)
    header = with_first_name(request, header)
    await parts.pace.check(header)
    layout = await parts.service.intake.admit(header, principal.token)
    return UploadLimit(bytes=update_limit(layout), token=principal.token)


@router.get("/data_statistics_limit")
async def limit_of_data_statistics(request: Request, header: Annotated[DataStatisticsHeader, Query()]) -> UploadLimit:
    _require_peer(request)
    principal, parts = principal_of(request), parts_of(request)
    principal.require_worker(header.worker)
    expert = parts.service.coordinator.expert(with_first_name(request, header).expert)
    expert.require_active()
    return UploadLimit(bytes=body_limit(header.kind, expert.manifest.layout), token=principal.token)


def _require_peer(request: Request) -> None:
    if not request.scope.get("state", {}).get(OF_PEER):
        raise RefusedError("forbidden", "only replicas of the federation ask for this.", "Push; the answer says it.")
