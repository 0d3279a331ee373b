"""HTTP routes of what goes on: heartbeats of workers, status of the federation, newest log lines of a worker."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool

from fedmoe.experts import ExpertModel
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.security import Principal, principal_of
from fedmoe.server.expert_names import may_use, resolve_expert
from fedmoe.server.federation_status import federation_status
from fedmoe.server.routes.app_state import service_of, with_first_name
from fedmoe.server.service import CoordinatorService
from fedmoe.wire.contract.status import Heartbeat, StatusInfo, WorkerLog, WorkerLogRequest

router = APIRouter()


@router.post("/heartbeat", status_code=204)
async def heartbeat(request: Request, message: Heartbeat) -> None:
    principal_of(request).require_worker(message.worker)
    service, internal = service_of(request), with_first_name(request, message)
    service.coordinator.expert(internal.expert)
    service.heartbeats.hear(internal, service.now)


@router.get("/status")
async def status(request: Request) -> StatusInfo:
    return await run_in_threadpool(federation_status, service_of(request), principal_of(request))


@router.get("/worker_log")
async def worker_log(request: Request, message: Annotated[WorkerLogRequest, Query()]) -> WorkerLog:
    principal, service = principal_of(request), service_of(request)
    principal.require_worker(message.worker)
    for expert in _experts(service, principal, message.expert):
        state = service.heartbeats.state(expert.name, message.worker, service.now)
        if state is not None:
            lines, following = service.heartbeats.lines(expert.name, message.worker, message.after)
            return WorkerLog(lines=lines, next=following, state=state)
    raise RefusedError(
        "unknown_worker",
        f"worker {message.worker!r} has sent no heartbeat since the coordinator's start.",
        "`fedmoe status` lists the workers; older programs send no heartbeats.",
    )


def _experts(service: CoordinatorService, principal: Principal, name: str | None) -> list[ExpertModel]:
    """The expert that is named, or all that the token may use."""
    experts = service.coordinator.experts
    if name is None:
        return [expert for expert in experts.values() if may_use(principal, expert)]
    return [service.coordinator.expert(resolve_expert(experts, principal, name))]
