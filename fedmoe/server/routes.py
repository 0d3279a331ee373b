"""The HTTP routes: thin doors to the service."""

from __future__ import annotations

import time
from typing import Annotated

from fastapi import FastAPI, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fedmoe import __version__
from fedmoe.coordinator import GatewayModel
from fedmoe.errors import RefusedError
from fedmoe.experts import ExpertModel
from fedmoe.lora.codec import WireDtype
from fedmoe.server import problems
from fedmoe.server.answers import EncodedCache, Weights, all_weights, answer_weights, expert_weights, gateway_weights
from fedmoe.server.receive import parse_content_digest
from fedmoe.server.security import Principal, TokenGate, new_token
from fedmoe.server.service import Body, CoordinatorService
from fedmoe.wire.messages import (
    SAFETENSORS,
    ChangeResult,
    ExpertInfo,
    ExpertRequest,
    FederationInfo,
    GatewayInfo,
    Listing,
    RegisterRequest,
    RetractRequest,
    RevokeRequest,
    RollbackRequest,
    StatisticRequest,
    TokenAnswer,
    TokenRequest,
    UpdateHeader,
    UpdateResult,
)

_MAX_JSON_BYTES = 4 << 20
# Bodies of updates have a cap of their own that follows from the expert; this one only lifts the cap for JSON.
_NO_CAP = 1 << 62
_LOOPBACK_HOSTS = ["127.0.0.1", "localhost", "[::1]", "testserver"]


class GateMiddleware:
    """Asks for a token on every path but `/healthz`, before a byte of the body is read."""

    def __init__(self, app: ASGIApp, gate: TokenGate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/healthz":
            try:
                principal = self._gate.admit(Headers(scope=scope).get("authorization"))
            except RefusedError as error:
                await problems.refusal(error)(scope, receive, send)
                return
            scope.setdefault("state", {})["principal"] = principal
        await self._app(scope, receive, send)


def create_app(service: CoordinatorService, gate: TokenGate, loopback: bool = True) -> FastAPI:
    """The coordinator's HTTP application; without tokens only requests addressed to this machine are taken."""
    app = FastAPI(
        title="FedMoE coordinator", version=__version__, docs_url=None, redoc_url=None, max_body_size=_MAX_JSON_BYTES
    )
    problems.install(app)
    cache = EncodedCache()
    _read_routes(app, service, cache)
    _write_routes(app, service, cache)
    _admin_routes(app, service, gate)
    app.add_middleware(GateMiddleware, gate=gate)
    if loopback and not gate.required:
        # A web page that rebinds its name to 127.0.0.1 still sends its own name as Host.
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOOPBACK_HOSTS)
    return app


def _read_routes(app: FastAPI, service: CoordinatorService, cache: EncodedCache) -> None:
    coordinator = service.coordinator

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        failed = service.failed is not None
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/federation")
    async def federation() -> FederationInfo:
        return service.federation()

    @app.get("/list_experts")
    def list_experts() -> Listing:
        experts = coordinator.experts
        enabled = coordinator.aggregation.enable_gateway
        gateway = _gateway_info(coordinator.gateway()) if enabled and experts else None
        infos = [_expert_info(experts[name], service) for name in sorted(experts)]
        return Listing(experts=infos, gateway=gateway, enable_gateway=enabled)

    @app.get("/get_gateway_weights")
    def get_gateway_weights(request: Request, dtype: WireDtype = "fp32") -> Response:
        weights = gateway_weights(coordinator.gateway(), coordinator.experts)
        return answer_weights(request, weights, dtype, cache)

    @app.get("/get_all_expert_weights")
    def get_all_expert_weights(request: Request, dtype: WireDtype = "fp32") -> Response:
        experts = coordinator.experts
        if not experts:
            raise RefusedError("unknown_expert", "no expert is registered yet.", "Start a worker first.")
        return answer_weights(request, all_weights(experts, coordinator.gateway_version), dtype, cache)

    @app.post("/get_expert_weights")
    def get_expert_weights(request: Request, wanted: ExpertRequest) -> Response:
        _principal(request).require_expert(wanted.expert)
        return answer_weights(request, _expert_weights(service, wanted.expert), wanted.dtype, cache)

    @app.get("/get_gateway_info")
    def get_gateway_info() -> GatewayInfo:
        return _gateway_info(coordinator.gateway())

    @app.get("/statistics")
    def statistics(expert: str | None = None) -> list[dict[str, object]]:
        return [
            {"expert": s.expert, "worker": s.worker, "kind": s.kind, "values": dict(s.payload), "at": s.at}
            for s in service.journal.statistics(expert)
        ]


def _write_routes(app: FastAPI, service: CoordinatorService, cache: EncodedCache) -> None:
    @app.post("/register_expert")
    async def register_expert(request: Request, wanted: RegisterRequest) -> ExpertInfo:
        principal = _principal(request)
        principal.require_expert(wanted.expert)
        principal.require_worker(wanted.worker)
        expert = await service.register(wanted)
        return await run_in_threadpool(_expert_info, expert, service)

    @app.post("/push_expert_update", response_model=UpdateResult, max_body_size=_NO_CAP)
    async def push_expert_update(request: Request, header: Annotated[UpdateHeader, Query()]) -> Response:
        principal = _principal(request)
        principal.require_worker(header.worker)
        principal.require_expert(header.expert)
        body = _update_body(request)
        try:
            result = await service.push(header, body)
        except RefusedError as error:
            if error.code != "too_stale" or header.answer != "weights":
                raise
            # Whoever is too far behind gets the newest version in the same answer and can go on from it.
            facts = {"code": error.code, "detail": error.detail, "fix": error.fix, **error.facts}
            return await run_in_threadpool(_with_weights, request, service, header.expert, cache, 409, facts)
        if header.answer == "weights":
            facts = result.model_dump()
            return await run_in_threadpool(_with_weights, request, service, header.expert, cache, 200, facts)
        return JSONResponse(result.model_dump())

    @app.post("/push_statistics", status_code=204)
    async def push_statistics(request: Request, wanted: StatisticRequest) -> None:
        principal = _principal(request)
        principal.require_expert(wanted.expert)
        principal.require_worker(wanted.worker)
        await service.add_statistic(wanted)


def _admin_routes(app: FastAPI, service: CoordinatorService, gate: TokenGate) -> None:
    @app.post("/rollback")
    async def rollback(request: Request, wanted: RollbackRequest) -> ChangeResult:
        _principal(request).require_admin()
        return await service.roll_back(wanted)

    @app.post("/retract")
    async def retract(request: Request, wanted: RetractRequest) -> ChangeResult:
        _principal(request).require_admin()
        return await service.retract(wanted)

    @app.post("/tokens")
    async def make_token(request: Request, wanted: TokenRequest) -> TokenAnswer:
        _principal(request).require_admin()
        token = new_token()
        expires_at = time.time() + wanted.expires_in if wanted.expires_in is not None else None
        record = gate.add(token, wanted.role, wanted.worker, wanted.experts, expires_at)
        return TokenAnswer(token=token, hash=record.hash)

    @app.post("/tokens/revoke", status_code=204)
    async def revoke_token(request: Request, wanted: RevokeRequest) -> None:
        _principal(request).require_admin()
        gate.revoke(wanted.hash)


def _principal(request: Request) -> Principal:
    principal = request.scope["state"]["principal"]
    assert isinstance(principal, Principal), "the gate runs before every route"
    return principal


def _update_body(request: Request) -> Body:
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != SAFETENSORS:
        raise RefusedError(
            "unsupported_type",
            f"an update is sent as {SAFETENSORS}, got {content_type or 'no Content-Type'}.",
            "Pickle, .pt and .bin files are never read; convert to safetensors.",
        )
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise RefusedError(
            "unsupported_type", f"Content-Encoding {encoding!r} is not taken.", "Send the bytes as they are."
        )
    length = request.headers.get("content-length")
    digest = parse_content_digest(request.headers.get("content-digest"))
    return Body(request.stream(), int(length) if length is not None else None, digest)


def _expert_weights(service: CoordinatorService, name: str) -> Weights:
    return expert_weights(service.coordinator.expert(name))


def _with_weights(
    request: Request, service: CoordinatorService, name: str, cache: EncodedCache, status: int, facts: dict[str, object]
) -> Response:
    return answer_weights(request, _expert_weights(service, name), "fp32", cache, status, facts)


def _expert_info(expert: ExpertModel, service: CoordinatorService) -> ExpertInfo:
    return ExpertInfo(
        name=expert.name,
        version=expert.version,
        rank=expert.manifest.layout.rank,
        alpha=expert.manifest.alpha,
        parameters=expert.manifest.layout.size,
        base=expert.manifest.base.name,
        digest=expert.digest,
        workers=service.roster.workers(expert.name, service.now),
    )


def _gateway_info(gateway: GatewayModel) -> GatewayInfo:
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
    )
