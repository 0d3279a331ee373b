"""The coordinator's HTTP application: middleware, and the routes of weights, updates and undo."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fedmoe import __version__
from fedmoe.experts import ExpertModel
from fedmoe.lora.codec import WireDtype
from fedmoe.lora.safetensors_bytes import CodecError
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access import problems
from fedmoe.server.access.audited_requests import AuditMiddleware
from fedmoe.server.access.authentication import AuthenticationMiddleware
from fedmoe.server.access.security import principal_of
from fedmoe.server.access.tokens import TokenGate
from fedmoe.server.access.turns import TOKEN_RATE, UPLOADS, Rate
from fedmoe.server.access.uploads import PushPace, UploadLimits, UploadPlaces
from fedmoe.server.expert_names import may_use, resolve_expert, scope_by_first_names
from fedmoe.server.page.files import PageFiles
from fedmoe.server.page.login import LoginLinks, LoginMiddleware
from fedmoe.server.routes import (
    admin_routes,
    expert_routes,
    gate_routes,
    join_routes,
    page_routes,
    replica_routes,
    status_routes,
)
from fedmoe.server.routes.app_state import (
    AppState,
    IncarnationHeader,
    parts_of,
    service_of,
    with_first_name,
    with_incarnation,
)
from fedmoe.server.routes.coordinator_metrics import CoordinatorMetrics
from fedmoe.server.routes.documented_answers import ANSWERS, PROBLEMS
from fedmoe.server.routes.expert_routes import expert_info, gateway_info
from fedmoe.server.routes.json_weights import JsonPolicy
from fedmoe.server.routes.request_counts import CountingMiddleware, RequestCounts
from fedmoe.server.routes.short_answers import ShortAnswer, answer_with_other
from fedmoe.server.routes.weight_responses import (
    WeightAnswers,
    all_weights,
    expert_weights,
    gateway_weights,
    has_etag,
    refuse_without,
)
from fedmoe.server.service import CoordinatorService
from fedmoe.server.storage.audit import AuditLog
from fedmoe.server.storage.records import StoredStatistic
from fedmoe.server.updates.upload import content_digest, tensor_body
from fedmoe.wire.contract.experts import ExpertInfo, GatewayInfo, GatewayInfoRequest, StatisticsRequest
from fedmoe.wire.contract.messages import (
    MINIMAL,
    SAFETENSORS,
    WITH_OTHER,
    ChangeResult,
    DataStatisticsHeader,
    DataStatisticsRequest,
    DataStatisticsResult,
    ExpertRequest,
    FederationInfo,
    RegisterRequest,
    RetractRequest,
    RollbackRequest,
    StatisticRequest,
    UpdateHeader,
    UpdateResult,
)
from fedmoe.wire.contract.replicas import OwnerInfo
from fedmoe.wire.http import openapi
from fedmoe.wire.http.body_limits import BodyGuard
from fedmoe.wire.http.metrics import metrics_page
from fedmoe.wire.http.middleware import (
    JSON,
    CrossSiteMiddleware,
    HeadMiddleware,
    NegotiationMiddleware,
    ProtocolMiddleware,
    RepeatedMiddleware,
    readiness,
)

# Answered in another form than JSON too, or only.
_OTHER_FORMS = frozenset(
    {
        *("/get_gateway_weights", "/get_all_expert_weights", "/get_expert_weights", "/gateway_candidate_weights"),
        *("/data_statistics", "/push_expert_update", "/metrics", "/live"),
    }
)
_ANSWERED_WITH_WEIGHTS = ("too_stale", "other_history")

router = APIRouter()


def create_app(
    service: CoordinatorService,
    gate: TokenGate,
    loopback: bool = True,
    json: JsonPolicy | None = None,
    min_sync_interval: float | None = None,
    upload_limits: UploadLimits | None = None,
    token_rate: Rate | None = TOKEN_RATE,
    audit: AuditLog | None = None,
    owners: Callable[[], Sequence[OwnerInfo]] = lambda: (),
    links: LoginLinks | None = None,
) -> FastAPI:
    """The coordinator's HTTP application; without tokens only requests addressed to this machine are taken."""
    app = FastAPI(title="FedMoE coordinator", version=__version__, docs_url=None, redoc_url=None)
    places, pace = UploadPlaces(upload_limits), PushPace(min_sync_interval, service.intake.knows)
    problems.install(app)
    # Flat, so that whoever lists the routes sees each of them.
    others = (expert_routes, gate_routes, admin_routes, join_routes, replica_routes, status_routes, page_routes)
    for part in (router, *(module.router for module in others)):
        app.router.routes.extend(part.routes)
    requests = RequestCounts(route.path for route in app.routes if isinstance(route, Route))
    metrics = CoordinatorMetrics(service, requests, owners)
    answers, live = WeightAnswers(json or JsonPolicy()), page_routes.live_status(service)
    app.state.parts = AppState(service, gate, answers, places, pace, metrics, owners, live)
    app.add_middleware(NegotiationMiddleware, others=_OTHER_FORMS, refuse=problems.refusal)
    app.add_middleware(RepeatedMiddleware, refuse=problems.refusal)
    app.add_middleware(IncarnationHeader, incarnation=service.current.incarnation)
    app.add_middleware(PageFiles)
    app.add_middleware(AuthenticationMiddleware, gate=gate, token_rate=token_rate)
    app.add_middleware(LoginMiddleware, gate=gate, links=links or LoginLinks(gate))
    if not gate.required:
        app.add_middleware(
            CrossSiteMiddleware,
            loopback_only=loopback,
            remedy="Use http://127.0.0.1, or start the coordinator with --host and tokens.",
            refuse=problems.refusal,
        )
    app.add_middleware(ProtocolMiddleware, server="this coordinator", refuse=problems.refusal)
    if audit is not None:
        app.add_middleware(AuditMiddleware, log=audit, gate=gate)
    # These caps follow from the expert, so the service sets them.
    app.add_middleware(BodyGuard, caps=dict.fromkeys(UPLOADS))
    app.add_middleware(CountingMiddleware, counts=requests)
    app.add_middleware(HeadMiddleware)
    openapi.install(app, ANSWERS, PROBLEMS, gate.required)
    return app


@router.get("/healthz")
async def healthz(request: Request) -> JSONResponse:
    failed = service_of(request).committer.failed is not None
    return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)


@router.get("/readyz")
async def readyz(request: Request) -> Response:
    return readiness(service_of(request).not_ready)


@router.get("/metrics")
def metrics(request: Request) -> Response:
    """For administrators and viewers: who trains what, and how much, is not for every worker to see."""
    principal_of(request).require_sight()
    return metrics_page(parts_of(request).metrics.collect())


@router.get("/federation")
async def federation(request: Request) -> FederationInfo:
    return with_incarnation(request, service_of(request).federation())


@router.get("/get_gateway_weights")
def get_gateway_weights(request: Request, dtype: WireDtype = "fp32") -> Response:
    service = service_of(request)
    gateway, experts = service.gateway(), service.coordinator.active or service.coordinator.experts
    return parts_of(request).answers.answer(request, gateway_weights(gateway, experts), dtype)


@router.get("/get_all_expert_weights")
def get_all_expert_weights(request: Request, dtype: WireDtype = "fp32") -> Response:
    view = service_of(request).coordinator.transaction()  # experts and version of one moment
    principal = principal_of(request)
    readable = [expert for expert in view.experts.values() if may_use(principal, expert) and not expert.retired]
    experts = {expert.title: expert for expert in readable}
    if not experts:
        raise RefusedError("unknown_expert", "there is no expert yet that you may read.", "Start a worker first.")
    return parts_of(request).answers.answer(request, all_weights(experts, view.gateway_version), dtype)


@router.post("/get_expert_weights")
def get_expert_weights(request: Request, message: ExpertRequest) -> Response:
    coordinator = service_of(request).coordinator
    first = resolve_expert(coordinator.experts, principal_of(request), message.expert)
    weights = expert_weights(coordinator.expert(first), message.expert)
    return parts_of(request).answers.answer(request, weights, message.dtype)


@router.get("/get_gateway_info")
def get_gateway_info(request: Request, message: Annotated[GatewayInfoRequest, Query()]) -> GatewayInfo:
    service = service_of(request)
    return gateway_info(service, service.gateway() if message.merged else service.gateway_plan())


@router.get("/statistics")
def statistics(request: Request, message: Annotated[StatisticsRequest, Query()]) -> Response:
    service, principal, facts = service_of(request), principal_of(request), message.model_dump()
    experts = service.coordinator.experts
    if message.expert is not None:
        facts["expert"] = resolve_expert(experts, principal, message.expert)
    rows, following = service.reported.page(scope_by_first_names(principal, experts), **facts)
    headers = {} if following is None else {"FedMoE-Next": str(following)}
    return JSONResponse([_statistic(row, experts) for row in rows], headers=headers)


def _statistic(row: StoredStatistic, experts: Mapping[str, ExpertModel]) -> dict[str, object]:
    statistic = row.statistic
    name = experts[statistic.expert].title if statistic.expert in experts else statistic.expert
    facts = {"expert": name, "worker": statistic.worker, "kind": statistic.kind, "values": dict(statistic.payload)}
    return {"id": row.id, **facts, "at": statistic.at}


@router.get("/data_statistics")
def data_statistics(request: Request, message: Annotated[DataStatisticsRequest, Query()]) -> Response:
    service = service_of(request)
    first = resolve_expert(service.coordinator.experts, principal_of(request), message.expert)
    service.coordinator.expert(first)
    tag = service.statistics.tag(first, message.kind)
    refuse_without(request, SAFETENSORS)
    headers = {"ETag": f'"{tag}"'}
    if has_etag(request, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    body = service.statistics.merged(first, message.kind)
    headers["Content-Digest"] = content_digest(hashlib.sha256(body).digest())
    return Response(body, 200, headers, SAFETENSORS)


@router.post("/register_expert")
async def register_expert(request: Request, message: RegisterRequest) -> ExpertInfo:
    principal, service = principal_of(request), service_of(request)
    resolve_expert(service.coordinator.experts, principal, message.expert)
    principal.require_worker(message.worker)
    expert = await service.register(message, principal)
    info = await run_in_threadpool(expert_info, expert, service)
    return with_incarnation(request, info.model_copy(update={"name": message.expert}))


@router.post("/push_expert_update", response_model=UpdateResult)
async def push_expert_update(request: Request, header: Annotated[UpdateHeader, Query()]) -> Response:
    principal, parts = principal_of(request), parts_of(request)
    principal.require_worker(header.worker)
    asked, header = header.expert, with_first_name(request, header)
    shorter: ShortAnswer | None = None
    try:
        with parts.metrics.pushes.outcome(header.expert, parts.service.coordinator.experts) as outcome:
            outcome.result = landed = await _take_in(request, header)
        status = 202 if landed.status == "quarantined" else 200
        facts = with_incarnation(request, landed).model_copy(update={"expert": asked}).model_dump()
        shorter = await _instead_of_weights(request, header, landed)
    except (RefusedError, CodecError) as error:
        parts.service.activity.refused(header.expert, header.worker, f"{error} [{error.code}]")
        if isinstance(error, CodecError) or error.code not in _ANSWERED_WITH_WEIGHTS or header.answer != "weights":
            raise
        # Whoever is too far behind, or of another history, gets the newest version in the same answer.
        status, facts = 409, problems.as_json(error)
    if shorter is not None:
        return shorter.response(facts)
    if header.answer == "weights":
        return await run_in_threadpool(_with_weights, request, asked, status, facts)
    return JSONResponse(facts, status)


async def _instead_of_weights(request: Request, header: UpdateHeader, landed: UpdateResult) -> ShortAnswer | None:
    """What a sender that prefers a short answer makes the newest weights of; None where they have to be sent."""
    service, prefers = service_of(request), request.headers.get("prefer", "")
    expert = service.coordinator.expert(header.expert)
    newest = landed.status == "landed" and landed.version == expert.version
    if not newest or header.answer != "weights" or MINIMAL not in prefers:
        return None
    if not service.coordinator.aggregation.plain_rule:
        return None
    if landed.version == header.base_version + 1:
        return ShortAnswer(expert.digest)
    if landed.version > header.base_version + 2 or WITH_OTHER not in prefers:
        return None
    return await run_in_threadpool(answer_with_other, service.journal, service.blobs, expert, landed.digest)


async def _take_in(request: Request, header: UpdateHeader) -> UpdateResult:
    token, parts, body = principal_of(request).token, parts_of(request), tensor_body(request)
    if header.answer == "weights":  # refused before the push changes anything
        parts.answers.check(request, parts.service.coordinator.expert(header.expert).manifest.layout.size)
    else:
        refuse_without(request, JSON)
    async with parts.pace.enforced(header), parts.places.place(token, header.worker, body.chunks) as chunks:
        return await parts.service.intake.push(header, replace(body, chunks=chunks), token)


def _with_weights(request: Request, name: str, status: int, facts: dict[str, object]) -> Response:
    weights = expert_weights(service_of(request).coordinator.expert(name), name)
    return parts_of(request).answers.answer(request, weights, "fp32", status, facts)


@router.post("/push_statistics", status_code=204)
async def push_statistics(request: Request, message: StatisticRequest) -> None:
    principal_of(request).require_worker(message.worker)
    await service_of(request).add_statistic(with_first_name(request, message))


@router.post("/push_data_statistics")
async def push_data_statistics(
    request: Request, header: Annotated[DataStatisticsHeader, Query()]
) -> DataStatisticsResult:
    principal, parts = principal_of(request), parts_of(request)
    principal.require_worker(header.worker)
    internal, body = with_first_name(request, header), tensor_body(request)
    async with parts.places.place(principal.token, header.worker, body.chunks) as chunks:
        result = await parts.service.intake.push_data_statistics(
            internal, replace(body, chunks=chunks), principal.token
        )
    return result.model_copy(update={"expert": header.expert})


@router.post("/rollback")
async def rollback(request: Request, message: RollbackRequest) -> ChangeResult:
    principal_of(request).require_admin(expert=message.expert)
    result = await service_of(request).undo.roll_back(with_first_name(request, message))
    return with_incarnation(request, result.model_copy(update={"expert": message.expert}))


@router.post("/retract")
async def retract(request: Request, message: RetractRequest) -> ChangeResult:
    principal_of(request).require_admin(expert=message.expert, worker=message.worker)
    service, internal = service_of(request), with_first_name(request, message)
    result = await (service.withdrawals.withdraw(internal) if message.erase else service.undo.retract(internal))
    return with_incarnation(request, result.model_copy(update={"expert": message.expert}))
