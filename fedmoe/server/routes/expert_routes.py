"""HTTP routes that list, rename and retire experts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Annotated

import structlog
from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from fedmoe.coordinator import GatewayPlan, Transaction
from fedmoe.experts import ExpertModel
from fedmoe.federation.online_gateway import OnlineGateway
from fedmoe.server.access.security import principal_of
from fedmoe.server.expert_names import by_title, may_use
from fedmoe.server.routes.app_state import AppState, parts_of, service_of
from fedmoe.server.routes.weight_responses import gateway_facts
from fedmoe.server.service import CoordinatorService
from fedmoe.wire.contract.experts import (
    BranchPointInfo,
    ExpertInfo,
    ExpertListing,
    GatewayInfo,
    ListingRequest,
    OnlineGatewayInfo,
    RenameRequest,
    RetireRequest,
    UnretireRequest,
)

_log = structlog.get_logger("fedmoe.coordinator")
router = APIRouter()


@router.get("/list_experts", response_model=ExpertListing)
def list_experts(request: Request, message: Annotated[ListingRequest, Query()]) -> Response:
    principal, service = principal_of(request), service_of(request)
    coordinator = service.coordinator
    enabled = coordinator.aggregation.enable_gateway
    gateway = _gateway_json(parts_of(request)) if enabled and coordinator.active and service.has_gateway else "null"
    listed = [expert for expert in coordinator.experts.values() if message.retired or not expert.retired]
    following = [expert for expert in listed if expert.title > message.after and may_use(principal, expert)]
    following.sort(key=lambda expert: expert.title)
    warning = service.leases.warning if message.flags else None
    page, prompts = following[: message.limit], service.statistics.tags("prompts")
    entries = service.entries.written(page, prompts, service.now, message.held_out, warning)
    more = ',"more":true' if len(following) > message.limit else ""
    text = f'{{"experts":{entries},"gateway":{gateway},"enable_gateway":{json.dumps(enabled)}{more}}}'
    return Response(text, media_type="application/json")


def _gateway_json(parts: AppState) -> str:
    """The gateway in a listing, written once while it stays the same and no evaluation gate has its say."""
    gateway, last = parts.service.gateway_plan(), parts.listed_gateway
    if last is not None and last[0] is gateway and parts.service.evaluation_gate is None:
        return last[1]
    text = gateway_info(parts.service, gateway).model_dump_json()
    parts.listed_gateway = (gateway, text)
    return text


@router.post("/rename_expert")
async def rename_expert(request: Request, message: RenameRequest) -> ExpertInfo:
    service = service_of(request)
    expert, info = await _change(
        request, message.expert, lambda transaction: transaction.rename(message.expert, message.name, service.now)
    )
    _log.warning("renamed", expert=expert.name, name=expert.title, formerly=message.expert)
    return info


@router.post("/retire_expert")
async def retire_expert(request: Request, message: RetireRequest) -> ExpertInfo:
    service = service_of(request)
    expert, info = await _change(
        request, message.expert, lambda transaction: transaction.retire(message.expert, message.reason, service.now)
    )
    _log.warning("retired", expert=expert.title, reason=message.reason)
    return info


@router.post("/unretire_expert")
async def unretire_expert(request: Request, message: UnretireRequest) -> ExpertInfo:
    service = service_of(request)
    expert, info = await _change(
        request, message.expert, lambda transaction: transaction.unretire(message.expert, service.now)
    )
    _log.warning("unretired", expert=expert.title)
    return info


async def _change(
    request: Request, name: str, change: Callable[[Transaction], ExpertModel]
) -> tuple[ExpertModel, ExpertInfo]:
    principal_of(request).require_admin(expert=name)
    service = service_of(request)
    expert = await service.committer.decided(change)
    return expert, await run_in_threadpool(expert_info, expert, service)


def expert_info(expert: ExpertModel, service: CoordinatorService) -> ExpertInfo:
    """One expert as a listing shows it."""
    prompts = service.statistics.tags("prompts")
    return service.entries.info(expert, prompts.get(expert.name), service.now)


def gateway_info(service: CoordinatorService, gateway: GatewayPlan) -> GatewayInfo:
    """The gateway without its weights; what only a merge tells is left out while it was not merged."""
    gate = service.evaluation_gate
    facts: dict[str, object] = {
        "gate": gate.info() if gate is not None else None,
        "living": _online_info(gateway.online_gateway, service.coordinator.experts),
        "incarnation": service.current.incarnation,
        "left_out": dict(gateway.left_out),
    }
    if (layout := gateway.layout) is not None:
        facts |= {
            "rank": layout.rank,
            "parameters": layout.size,
            "modules": len(layout.modules),
            "lora_A_shape": (layout.rank, sum(module.in_features for module in layout.modules)),
            "lora_B_shape": (sum(module.out_features for module in layout.modules), layout.rank),
        }
    return GatewayInfo.model_validate(gateway_facts(gateway) | facts)


def _online_info(online: OnlineGateway | None, experts: Mapping[str, ExpertModel]) -> OnlineGatewayInfo | None:
    if online is None:
        return None
    return OnlineGatewayInfo(
        folds=online.number,
        staleness=by_title(online.last.staleness, experts) if online.last else {},
        seconds=online.last.seconds if online.last else 0.0,
        departures={
            name: BranchPointInfo(gateway=point.gateway, version=point.version, steps=point.steps)
            for name, point in by_title(online.branch_points, experts).items()
        },
    )
