"""HTTP routes of the gateway server: complete responses, server-sent event streams, client disconnects."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Annotated, TypeVar, cast

from fastapi import Depends, FastAPI, Request
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from fedmoe import __version__
from fedmoe.gateway.serve import problems
from fedmoe.gateway.serve.api_keys import ApiKeyMiddleware
from fedmoe.gateway.serve.catalogue import AUTO, BASE
from fedmoe.gateway.serve.counters import state_metrics
from fedmoe.gateway.serve.problems import ApiError, of_backend
from fedmoe.gateway.serve.requests import MOST_CHOICES, ChatRequest, CompletionRequest
from fedmoe.gateway.serve.responses import EndpointKind, JsonObject, ResponseBuilder, model_card
from fedmoe.gateway.serve.route_answers import ANSWERS, PROBLEMS
from fedmoe.gateway.serve.service import ActiveRequest, Chunk, GenerationRequest, Service, joined
from fedmoe.gateway.serve.version_watcher import WatchHealth
from fedmoe.inference.backend import BackendError
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
    excludes,
    not_acceptable,
    readiness,
)

MAX_BODY_BYTES = 1 << 20
_CHAT, _TEXTS = "/v1/chat/completions", "/v1/completions"
# Answered as text or as events.
_OTHER_FORMS = frozenset({"/metrics", _CHAT, _TEXTS})
#: What the OpenAI interface generates for a text when nothing is said.
_DEFAULT_TEXT_TOKENS = 16
_CLIENT_GONE = 499

OpenAIRequest = ChatRequest | CompletionRequest
WorkResult = TypeVar("WorkResult")


async def get_service(request: Request) -> Service:
    """The service that `create_app` gave the application."""
    return cast(Service, request.app.state.service)


async def get_health(request: Request) -> WatchHealth:
    """How well the coordinator is followed now."""
    return cast(WatchHealth, request.app.state.health())


UsedService = Annotated[Service, Depends(get_service)]
CurrentHealth = Annotated[WatchHealth, Depends(get_health)]


def create_app(
    service: Service, health: Callable[[], WatchHealth], keys: frozenset[str] | None, loopback_only: bool
) -> FastAPI:
    """The server's HTTP application; `keys` None asks for none, `loopback_only` as in `CrossSiteMiddleware`."""
    app = FastAPI(title="FedMoE gateway", version=__version__, docs_url=None, redoc_url=None)
    app.state.service, app.state.health = service, health
    problems.install(app)
    looks: dict[str, Callable[..., Awaitable[Response]]] = {"/healthz": healthz, "/readyz": readyz, "/metrics": metrics}
    looks |= {"/v1/models": models, "/v1/models/{name}": model}
    for path, handler in looks.items():
        app.add_api_route(path, handler, methods=["GET"])
    app.add_api_route(_CHAT, chat, methods=["POST"])
    app.add_api_route(_TEXTS, completion, methods=["POST"])
    app.add_middleware(NegotiationMiddleware, others=_OTHER_FORMS, refuse=problems.refusal)
    app.add_middleware(RepeatedMiddleware, refuse=problems.refusal)
    add_guard(app, keys, loopback_only)
    app.add_middleware(ProtocolMiddleware, server="this gateway server", refuse=problems.refusal)
    app.add_middleware(BodyGuard, caps=dict.fromkeys((_CHAT, _TEXTS), MAX_BODY_BYTES))
    app.add_middleware(HeadMiddleware)
    openapi.install(app, ANSWERS, PROBLEMS, keys is not None)
    return app


def add_guard(app: Starlette, keys: frozenset[str] | None, loopback_only: bool) -> None:
    """Ask for one of `keys` (hashes); where None is asked for, take nothing that a page of another site sends."""
    if keys is not None:
        app.add_middleware(ApiKeyMiddleware, keys=keys)
        return
    app.add_middleware(
        CrossSiteMiddleware,
        loopback_only=loopback_only,
        remedy="Use http://127.0.0.1, or start the server with --api-keys.",
        refuse=problems.refusal,
    )


async def healthz(health: CurrentHealth) -> JSONResponse:
    """The server runs; how long the coordinator has been silent, in seconds."""
    status = "behind" if health.behind else "ok"
    return JSONResponse({"status": status, "coordinator_silent_seconds": round(health.seconds_since_answer, 1)})


async def readyz(service: UsedService, health: CurrentHealth) -> Response:
    """Ready when the coordinator's models can be asked for; one that is away takes back none that is loaded."""
    served = service.catalogue.snapshot.models
    if not served and health.behind:
        return readiness("no model of the federation is served yet; the server's log says why")
    missing = set(served.values()) - service.backend.loaded()
    return readiness(f"not loaded: {', '.join(sorted(model.name for model in missing))}" if missing else None)


async def metrics(service: UsedService, health: CurrentHealth) -> Response:
    """Counters and the present state for Prometheus."""
    state = state_metrics(service.catalogue.snapshot, health, *service.backend.busy())
    return metrics_page([*service.counters.collect(), *state])


async def models(service: UsedService) -> JSONResponse:
    """All models that can be asked for."""
    return JSONResponse({"object": "list", "data": [_card(service, name) for name in service.names()]})


async def model(name: str, service: UsedService) -> JSONResponse:
    """One model."""
    _check_name(service, name)
    return JSONResponse(_card(service, name))


def _card(service: Service, name: str) -> JsonObject:
    snapshot, base = service.catalogue.snapshot, service.base.weights_hash
    if name in (BASE, AUTO):
        return model_card(name, int(snapshot.since), 0, base, base)
    served = snapshot.models[name]
    return model_card(name, int(snapshot.since), served.version, served.digest, base)


async def chat(request: Request, body: ChatRequest, service: UsedService) -> Response:
    """Answer a conversation."""
    _check(request, service, body)
    prompt = service.prompter.of_chat([message.plain() for message in body.messages])
    generation = _generation(service, body, [prompt], body.most_new_tokens, service.limits.output_tokens)
    return await _answer(request, service, body, generation, "chat")


async def completion(request: Request, body: CompletionRequest, service: UsedService) -> Response:
    """Continue one or several texts."""
    _check(request, service, body)
    encoder = service.prompter
    prompts = [
        encoder.of_text(prompt) if isinstance(prompt, str) else encoder.of_tokens(prompt) for prompt in body.prompts
    ]
    generation = _generation(service, body, prompts, body.max_tokens, _DEFAULT_TEXT_TOKENS)
    return await _answer(request, service, body, generation, "text")


def _check(request: Request, service: Service, body: OpenAIRequest) -> None:
    """First whether the model is there, for which every field means something; then what no schema tells."""
    form = EventStream.media_type if body.stream else JSON
    if excludes(request.headers.getlist("accept"), form):
        raise not_acceptable(form)
    try:
        _check_name(service, body.model)
    except ApiError as error:
        service.counters.refused[error.code] += 1
        raise
    if body.contradiction is not None:
        raise ApiError("invalid_value", body.contradiction)


def _check_name(service: Service, name: str) -> None:
    if name not in service.names():
        there = ", ".join(service.names())
        raise ApiError("model_not_found", f"there is no model {name[:80]!r}; there are: {there}", "model")


def _generation(
    service: Service, body: OpenAIRequest, prompts: Sequence[tuple[int, ...]], most: int | None, default: int
) -> GenerationRequest:
    limit = service.limits.output_tokens
    if most is not None and most > limit:
        raise ApiError("invalid_value", f"at most {limit} tokens are generated here, got {most}", "max_tokens")
    if len(prompts) * (body.n or 1) > MOST_CHOICES:
        raise ApiError("invalid_value", f"prompts times n may be {MOST_CHOICES}, got {len(prompts)} x {body.n}", "n")
    return GenerationRequest(
        body.model,
        tuple(prompts),
        body.n or 1,
        min(default, limit) if most is None else most,
        1.0 if body.temperature is None else body.temperature,
        1.0 if body.top_p is None else body.top_p,
        body.seed,
        body.alternatives if isinstance(body, ChatRequest) else body.logprobs,
        body.stops,
    )


async def _answer(
    request: Request, service: Service, body: OpenAIRequest, generation: GenerationRequest, kind: EndpointKind
) -> Response:
    try:
        # A prompt to `auto` waits here until it is routed; no other request does.
        active = await _unless_gone(request.receive, service.begin(generation))
    except (ApiError, BackendError) as error:
        service.counters.refused[error.code if isinstance(error, ApiError) else of_backend(error).code] += 1
        raise
    if active is None:
        service.counters.refused["client_gone"] += 1
        return Response(status_code=_CLIENT_GONE)
    number, created = uuid.uuid4().hex, int(time.time())
    builder = ResponseBuilder(kind, number, created, active.origin, service.prompter, generation.alternatives)
    if body.stream:
        return EventStream(active, builder, body.include_usage)
    async with active:
        content = await _unless_gone(request.receive, _whole(active, builder))
    if content is None:  # the client is gone, so this status is never read
        return Response(status_code=_CLIENT_GONE)
    return JSONResponse(content, headers=active.origin.headers())


async def _whole(active: ActiveRequest, builder: ResponseBuilder) -> JsonObject:
    chunks: list[list[Chunk]] = [[] for _ in range(active.request.choices)]
    async with aclosing(active.chunks()) as stream:
        async for index, chunk in stream:
            chunks[index].append(chunk)
    return builder.whole([joined(parts) for parts in chunks], active.usage)


async def _unless_gone(receive: Receive, work: Coroutine[None, None, WorkResult]) -> WorkResult | None:
    """The result of `work`, or None, and the work given up, when the client goes away first."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    doing, leaving = asyncio.create_task(work), asyncio.create_task(disconnect())
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await doing if doing.done() else None
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


class EventStream(Response):
    """An answer as server-sent events; gives everything back when it ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, active: ActiveRequest, builder: ResponseBuilder, include_usage: bool) -> None:
        super().__init__(headers={**active.origin.headers(), "cache-control": "no-store"})
        del self.headers["content-length"]
        self._active, self._builder, self._include_usage = active, builder, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._active:
            await _unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events()) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        for opening in self._builder.opening(self._active.request.choices):
            yield _event(opening)
        try:
            async with aclosing(self._active.chunks()) as chunks:
                async for index, chunk in chunks:
                    if chunk.text or chunk.finish or self._builder.alternatives is not None:
                        yield _event(self._builder.part(index, chunk))
        except BackendError as error:
            # The status has long been sent; clients take an event with an error for what it is.
            yield _event(of_backend(error).body())
            return
        if self._include_usage:
            yield _event(self._builder.closing(self._active.usage))
        yield b"data: [DONE]\n\n"


def _event(body: JsonObject) -> bytes:
    return b"data: " + json.dumps(body, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
