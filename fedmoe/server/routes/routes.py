"""The coordinator's HTTP application: middleware, and the routes of weights, updates and undo."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, TypeVar

from fastapi import FastAPI, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from fedmoe import __version__
from fedmoe.experts import ExpertModel
from fedmoe.lora.codec import WireDtype
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access import problems
from fedmoe.server.access.audited_requests import AuditMiddleware
from fedmoe.server.access.quotas import Rate
from fedmoe.server.access.security import Principal, principal_of
from fedmoe.server.access.token_gate import GateMiddleware
from fedmoe.server.access.tokens import TokenGate
from fedmoe.server.access.turns import TOKEN_RATE
from fedmoe.server.access.uploads import UploadAdmission
from fedmoe.server.expert_names import may_use, resolve_expert, scope_by_first_names
from fedmoe.server.history.base_history import IncarnationHeader, answers_with_new_keys
from fedmoe.server.routes.documented_answers import ANSWERS, PROBLEMS
from fedmoe.server.routes.expert_routes import expert_info, expert_routes, gateway_info
from fedmoe.server.routes.gate_routes import gate_routes
from fedmoe.server.routes.json_weights import JsonPolicy
from fedmoe.server.routes.quarantine_routes import quarantine_routes
from fedmoe.server.routes.token_routes import token_routes
from fedmoe.server.routes.weight_responses import (
    WeightAnswers,
    all_weights,
    answer_statistics,
    expert_weights,
    gateway_weights,
    refuse_without,
)
from fedmoe.server.service import Body, CoordinatorService
from fedmoe.server.storage.audit import AuditLog
from fedmoe.server.storage.reported_statistics import StoredStatistic
from fedmoe.server.updates.upload import parse_content_digest
from fedmoe.wire.contract.experts import StatisticsRequest
from fedmoe.wire.contract.messages import (
    SAFETENSORS,
    ChangeResult,
    DataStatisticsHeader,
    DataStatisticsRequest,
    DataStatisticsResult,
    ExpertInfo,
    ExpertRequest,
    FederationInfo,
    GatewayInfo,
    RegisterRequest,
    RetractRequest,
    RollbackRequest,
    StatisticRequest,
    UpdateHeader,
    UpdateResult,
)
from fedmoe.wire.http import openapi
from fedmoe.wire.http.body_limits import BodyGuard
from fedmoe.wire.http.cross_site import CrossSiteMiddleware
from fedmoe.wire.http.health import HeadMiddleware, readiness
from fedmoe.wire.http.negotiation import JSON, NegotiationMiddleware
from fedmoe.wire.http.protocol_version import ProtocolMiddleware
from fedmoe.wire.http.repeated_parameters import RepeatedMiddleware

Addressed = TypeVar("Addressed", UpdateHeader, DataStatisticsHeader, StatisticRequest, RollbackRequest, RetractRequest)
_PUSH = "/push_expert_update"
_PUSH_STATISTICS = "/push_data_statistics"
# Answered as safetensors too, or only.
_WITH_TENSORS = frozenset(
    {
        *("/get_gateway_weights", "/get_all_expert_weights", "/get_expert_weights", "/gateway_candidate_weights"),
        *("/data_statistics", _PUSH),
    }
)
_ANSWERED_WITH_WEIGHTS = ("too_stale", "other_history")

NamedAnswer = TypeVar("NamedAnswer", ExpertInfo, FederationInfo, UpdateResult, ChangeResult)


def create_app(
    service: CoordinatorService,
    gate: TokenGate,
    loopback: bool = True,
    json: JsonPolicy | None = None,
    admission: UploadAdmission | None = None,
    token_rate: Rate | None = TOKEN_RATE,
    audit: AuditLog | None = None,
) -> FastAPI:
    """The coordinator's HTTP application; without tokens only requests addressed to this machine are taken."""
    app = FastAPI(title="FedMoE coordinator", version=__version__, docs_url=None, redoc_url=None)
    problems.install(app)
    answers = WeightAnswers(json or JsonPolicy())
    _read_routes(app, service, answers)
    _write_routes(app, service, answers, admission or UploadAdmission(None, service.knows))
    expert_routes(app, service)
    gate_routes(app, service, answers)
    quarantine_routes(app, service)
    _admin_routes(app, service)
    token_routes(app, gate)
    app.add_middleware(NegotiationMiddleware, others=_WITH_TENSORS, answer=problems.refusal)
    app.add_middleware(RepeatedMiddleware, answer=problems.refusal)
    app.add_middleware(IncarnationHeader, incarnation=service.current.incarnation)
    app.add_middleware(GateMiddleware, gate=gate, token_rate=token_rate)
    if not gate.required:
        app.add_middleware(
            CrossSiteMiddleware,
            loopback_only=loopback,
            remedy="Use http://127.0.0.1, or start the coordinator with --host and tokens.",
            refuse=problems.refusal,
        )
    app.add_middleware(ProtocolMiddleware, server="this coordinator", answer=problems.refusal)
    if audit is not None:
        app.add_middleware(AuditMiddleware, log=audit, gate=gate)
    # These caps follow from the expert, so the service sets them.
    app.add_middleware(BodyGuard, caps={_PUSH: None, _PUSH_STATISTICS: None})
    app.add_middleware(HeadMiddleware)
    openapi.install(app, ANSWERS, PROBLEMS, gate.required)
    return app


def _read_routes(app: FastAPI, service: CoordinatorService, answers: WeightAnswers) -> None:
    coordinator = service.coordinator

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        failed = service.failed is not None
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/readyz")
    async def readyz() -> Response:
        return readiness(service.not_ready)

    @app.get("/federation")
    async def federation(request: Request) -> FederationInfo:
        return _named(request, service, service.federation())

    @app.get("/get_gateway_weights")
    def get_gateway_weights(request: Request, dtype: WireDtype = "fp32") -> Response:
        gateway, active = service.gateway(), coordinator.active or coordinator.experts
        weights = gateway_weights(gateway, active)
        return answers.answer(request, weights, dtype)

    @app.get("/get_all_expert_weights")
    def get_all_expert_weights(request: Request, dtype: WireDtype = "fp32") -> Response:
        view = coordinator.transaction()  # experts and version of one moment
        readable = [one for one in view.experts.values() if may_use(principal_of(request), one) and not one.retired]
        experts = {expert.title: expert for expert in readable}
        if not experts:
            raise RefusedError("unknown_expert", "there is no expert yet that you may read.", "Start a worker first.")
        return answers.answer(request, all_weights(experts, view.gateway_version), dtype)

    @app.post("/get_expert_weights")
    def get_expert_weights(request: Request, wanted: ExpertRequest) -> Response:
        first = resolve_expert(coordinator.experts, principal_of(request), wanted.expert)
        return answers.answer(request, expert_weights(coordinator.expert(first), wanted.expert), wanted.dtype)

    @app.get("/get_gateway_info")
    def get_gateway_info() -> GatewayInfo:
        return gateway_info(service)

    @app.get("/statistics")
    def statistics(request: Request, wanted: Annotated[StatisticsRequest, Query()]) -> Response:
        experts, principal, facts = coordinator.experts, principal_of(request), wanted.model_dump()
        if wanted.expert is not None:
            facts["expert"] = resolve_expert(experts, principal, wanted.expert)
        rows, following = service.reported.page(scope_by_first_names(principal, experts), **facts)
        headers = {} if following is None else {"FedMoE-Next": str(following)}
        return JSONResponse([_statistic(row, experts) for row in rows], headers=headers)

    @app.get("/data_statistics")
    def data_statistics(request: Request, wanted: Annotated[DataStatisticsRequest, Query()]) -> Response:
        first = resolve_expert(coordinator.experts, principal_of(request), wanted.expert)
        coordinator.expert(first)
        kept, named = service.statistics, (first, wanted.kind)
        return answer_statistics(request, kept.tag(*named), lambda: kept.merged(*named))


def _write_routes(
    app: FastAPI, service: CoordinatorService, answers: WeightAnswers, admission: UploadAdmission
) -> None:
    @app.post("/register_expert")
    async def register_expert(request: Request, wanted: RegisterRequest) -> ExpertInfo:
        principal = principal_of(request)
        resolve_expert(service.coordinator.experts, principal, wanted.expert)
        principal.require_worker(wanted.worker)
        expert = await service.register(wanted, principal)
        info = await run_in_threadpool(expert_info, expert, service)
        return _named(request, service, info.model_copy(update={"name": wanted.expert}))

    @app.post(_PUSH, response_model=UpdateResult)
    async def push_expert_update(request: Request, header: Annotated[UpdateHeader, Query()]) -> Response:
        principal = principal_of(request)
        principal.require_worker(header.worker)
        asked, header = header.expert, _addressed(service, principal, header)
        body = _tensor_body(request)
        if header.answer == "weights":  # refused before the push changes anything
            answers.check(request, service.coordinator.expert(header.expert).manifest.layout.size)
        else:
            refuse_without(request, JSON)
        try:
            async with admission.push(principal.token, header, body.chunks) as chunks:
                landed = await service.push(header, replace(body, chunks=chunks), principal.token)
            result = _named(request, service, landed)
        except RefusedError as error:
            if error.code not in _ANSWERED_WITH_WEIGHTS or header.answer != "weights":
                raise
            # Whoever is too far behind, or of another history, gets the newest version in the same answer.
            facts = problems.as_json(error)
            return await run_in_threadpool(_with_weights, request, service, asked, answers, 409, facts)
        status = 202 if result.status == "quarantined" else 200
        facts = result.model_copy(update={"expert": asked}).model_dump()
        if header.answer == "weights":
            return await run_in_threadpool(_with_weights, request, service, asked, answers, status, facts)
        return JSONResponse(facts, status)

    @app.post("/push_statistics", status_code=204)
    async def push_statistics(request: Request, wanted: StatisticRequest) -> None:
        principal = principal_of(request)
        principal.require_worker(wanted.worker)
        await service.add_statistic(_addressed(service, principal, wanted))

    @app.post(_PUSH_STATISTICS)
    async def push_data_statistics(
        request: Request, header: Annotated[DataStatisticsHeader, Query()]
    ) -> DataStatisticsResult:
        principal = principal_of(request)
        principal.require_worker(header.worker)
        known = _addressed(service, principal, header)
        body = _tensor_body(request)
        async with admission.places.one(principal.token, header.worker, body.chunks) as chunks:
            result = await service.push_data_statistics(known, replace(body, chunks=chunks), principal.token)
        return result.model_copy(update={"expert": header.expert})


def _admin_routes(app: FastAPI, service: CoordinatorService) -> None:
    @app.post("/rollback")
    async def rollback(request: Request, wanted: RollbackRequest) -> ChangeResult:
        principal = principal_of(request)
        principal.require_admin(expert=wanted.expert)
        result = await service.roll_back(_addressed(service, principal, wanted))
        return _named(request, service, result.model_copy(update={"expert": wanted.expert}))

    @app.post("/retract")
    async def retract(request: Request, wanted: RetractRequest) -> ChangeResult:
        principal = principal_of(request)
        principal.require_admin(expert=wanted.expert, worker=wanted.worker)
        known = _addressed(service, principal, wanted)
        result = await (service.withdraw(known) if wanted.erase else service.retract(known))
        return _named(request, service, result.model_copy(update={"expert": wanted.expert}))


def _addressed(service: CoordinatorService, principal: Principal, wanted: Addressed) -> Addressed:
    """The request with the first name of its expert, which the token must be allowed to use."""
    first = resolve_expert(service.coordinator.experts, principal, wanted.expert)
    return wanted.model_copy(update={"expert": first})


def _statistic(row: StoredStatistic, experts: Mapping[str, ExpertModel]) -> dict[str, object]:
    told = row.statistic
    name = experts[told.expert].title if told.expert in experts else told.expert
    facts = {"expert": name, "worker": told.worker, "kind": told.kind, "values": dict(told.payload)}
    return {"id": row.id, **facts, "at": told.at}


def _tensor_body(request: Request) -> Body:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != SAFETENSORS:
        raise RefusedError(
            "unsupported_type",
            f"numbers are sent as {SAFETENSORS}, got {content_type or 'no Content-Type'}.",
            "Pickle, .pt and .bin files are never read; convert to safetensors.",
        )
    encoding = ", ".join(request.headers.getlist("content-encoding")) or "identity"
    if encoding.lower() != "identity":
        raise RefusedError(
            "unsupported_type", f"Content-Encoding {encoding!r} is not taken.", "Send the bytes as they are."
        )
    length = request.headers.get("content-length", "")
    digest = parse_content_digest(request.headers.getlist("content-digest"))
    return Body(request.stream(), int(length) if length.isdecimal() else None, digest)


def _named(request: Request, service: CoordinatorService, answer: NamedAnswer) -> NamedAnswer:
    """The answer with the history it is of, where its caller takes that."""
    name = service.current.incarnation if answers_with_new_keys(request.headers) else None
    return answer.model_copy(update={"incarnation": name})


def _with_weights(
    request: Request,
    service: CoordinatorService,
    name: str,
    answers: WeightAnswers,
    status: int,
    facts: dict[str, object],
) -> Response:
    return answers.answer(request, expert_weights(service.coordinator.expert(name), name), "fp32", status, facts)
