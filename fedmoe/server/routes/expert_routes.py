"""HTTP routes that list, rename and retire experts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated

import structlog
from fastapi import FastAPI, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from fedmoe.coordinator import GatewayModel
from fedmoe.experts import ExpertModel
from fedmoe.federation.online_gateway import OnlineGateway
from fedmoe.server.access.security import principal_of
from fedmoe.server.expert_names import by_title, may_use
from fedmoe.server.service import CoordinatorService
from fedmoe.wire.contract.experts import ListingRequest, RenameRequest, RetireRequest, UnretireRequest
from fedmoe.wire.contract.messages import (
    BranchPointInfo,
    ExpertInfo,
    GatewayInfo,
    Listing,
    OnlineGatewayInfo,
)

_log = structlog.get_logger("fedmoe.coordinator")


def expert_routes(app: FastAPI, service: CoordinatorService) -> None:
    """Add the routes."""
    gateways = _ListedGateway(service)

    @app.get("/list_experts", response_model=Listing)
    def list_experts(request: Request, wanted: Annotated[ListingRequest, Query()]) -> Response:
        principal, coordinator = principal_of(request), service.coordinator
        enabled = coordinator.aggregation.enable_gateway
        shown = gateways.written() if enabled and coordinator.active and service.has_gateway else "null"
        found = [one for one in coordinator.experts.values() if wanted.retired or not one.retired]
        ordered = sorted((one for one in found if may_use(principal, one)), key=lambda one: one.title)
        following = [one for one in ordered if one.title > wanted.after]
        prompts = service.statistics.tags("prompts")
        warning = service.leases.warning if wanted.flags else None
        page = following[: wanted.limit]
        experts = service.entries.written(page, prompts, service.now, wanted.held_out, warning)
        more = ',"more":true' if len(following) > wanted.limit else ""
        text = f'{{"experts":{experts},"gateway":{shown},"enable_gateway":{json.dumps(enabled)}{more}}}'
        return Response(text, media_type="application/json")

    @app.post("/rename_expert")
    async def rename_expert(request: Request, wanted: RenameRequest) -> ExpertInfo:
        principal_of(request).require_admin(expert=wanted.expert)
        expert = await service.change_experts(
            lambda transaction: transaction.rename(wanted.expert, wanted.name, service.now)
        )
        _log.warning("renamed", expert=expert.name, name=expert.title, formerly=wanted.expert)
        return await run_in_threadpool(expert_info, expert, service)

    @app.post("/retire_expert")
    async def retire_expert(request: Request, wanted: RetireRequest) -> ExpertInfo:
        principal_of(request).require_admin(expert=wanted.expert)
        expert = await service.change_experts(
            lambda transaction: transaction.retire(wanted.expert, wanted.reason, service.now)
        )
        _log.warning("retired", expert=expert.title, reason=wanted.reason)
        return await run_in_threadpool(expert_info, expert, service)

    @app.post("/unretire_expert")
    async def unretire_expert(request: Request, wanted: UnretireRequest) -> ExpertInfo:
        principal_of(request).require_admin(expert=wanted.expert)
        expert = await service.change_experts(lambda transaction: transaction.unretire(wanted.expert, service.now))
        _log.warning("unretired", expert=expert.title)
        return await run_in_threadpool(expert_info, expert, service)


def expert_info(expert: ExpertModel, service: CoordinatorService) -> ExpertInfo:
    """One expert as a listing shows it."""
    prompts = service.statistics.tags("prompts")
    return service.entries.info(expert, prompts.get(expert.name), service.now)


class _ListedGateway:
    """The gateway in a listing as JSON, written once while it stays the same and no evaluation gate has its say."""

    def __init__(self, service: CoordinatorService) -> None:
        self._service = service
        self._written: tuple[GatewayModel, str] | None = None

    def written(self) -> str:
        gateway = self._service.listed_gateway()
        kept = self._written
        if kept is not None and kept[0] is gateway and self._service.evaluation_gate is None:
            return kept[1]
        text = gateway_info(self._service, gateway).model_dump_json()
        self._written = (gateway, text)
        return text


def gateway_info(service: CoordinatorService, given: GatewayModel | None = None) -> GatewayInfo:
    """The gateway without its weights, the newest one if none is given."""
    gateway = service.gateway() if given is None else given
    layout = gateway.adapter.layout
    return GatewayInfo(
        version=gateway.version,
        strategy=gateway.strategy,
        rank=layout.rank,
        parameters=layout.size,
        modules=len(layout.modules),
        lora_A_shape=(layout.rank, sum(module.in_features for module in layout.modules)),
        lora_B_shape=(sum(module.out_features for module in layout.modules), layout.rank),
        sources=dict(gateway.sources),
        weights=dict(gateway.weights),
        truncation_error=gateway.truncation_error,
        digest=gateway.digest,
        statistics=dict(gateway.statistics),
        statistics_tokens=dict(gateway.statistics_tokens),
        notes=list(gateway.notes),
        scale=gateway.scale,
        gate=service.evaluation_gate.info() if service.evaluation_gate is not None else None,
        living=_living_info(gateway.online_gateway, service.coordinator.experts),
        source_digests=dict(gateway.source_digests),
        incarnation=service.current.incarnation,
        left_out=dict(gateway.left_out),
    )


def _living_info(online: OnlineGateway | None, experts: Mapping[str, ExpertModel]) -> OnlineGatewayInfo | None:
    if online is None:
        return None
    departures = by_title(online.branch_points, experts)
    return OnlineGatewayInfo(
        folds=online.number,
        staleness=by_title(online.last.staleness, experts) if online.last else {},
        seconds=online.last.seconds if online.last else 0.0,
        departures={
            name: BranchPointInfo(gateway=found.gateway, version=found.version, steps=found.steps)
            for name, found in departures.items()
        },
    )
