"""The HTTP routes: thin doors to the service, whole answers and streams, and clients that go away."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import TypeVar

from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import Receive, Scope, Send

from fedmoe import __version__
from fedmoe.gateway.serve import problems
from fedmoe.gateway.serve.api_keys import ApiKeyMiddleware
from fedmoe.gateway.serve.catalogue import AUTO, BASE
from fedmoe.gateway.serve.problems import ApiError, of_backend
from fedmoe.gateway.serve.requests import MOST_CHOICES, ChatRequest, CompletionRequest
from fedmoe.gateway.serve.responses import Form, Json, Kind, model_card
from fedmoe.gateway.serve.route_answers import ANSWERS, PROBLEMS
from fedmoe.gateway.serve.service import ActiveRequest, Chunk, GenerationRequest, Service, together
from fedmoe.gateway.serve.version_watcher import Health
from fedmoe.inference.backend import BackendError
from fedmoe.wire.http import openapi
from fedmoe.wire.http.body_limits import BodyGuard
from fedmoe.wire.http.cross_site import CrossSiteMiddleware
from fedmoe.wire.http.health import HeadMiddleware, readiness
from fedmoe.wire.http.negotiation import JSON, NegotiationMiddleware, excludes, not_acceptable
from fedmoe.wire.http.protocol_version import ProtocolMiddleware
from fedmoe.wire.http.repeated_parameters import RepeatedMiddleware

MAX_BODY_BYTES = 1 << 20
_CHAT, _TEXTS = "/v1/chat/completions", "/v1/completions"
# Answered as text or as events.
_OTHER_FORMS = frozenset({"/metrics", _CHAT, _TEXTS})
#: What the OpenAI interface generates for a text when nothing is said.
_DEFAULT_TEXT_TOKENS = 16
_GONE = 499

Result = TypeVar("Result")


def create_app(
    service: Service, health: Callable[[], Health], keys: frozenset[str] | None, loopback_only: bool
) -> FastAPI:
    """The server's HTTP application; `keys` None asks for none, `loopback_only` as in `CrossSiteMiddleware`."""
    app = FastAPI(title="FedMoE gateway", version=__version__, docs_url=None, redoc_url=None)
    problems.install(app)
    _look_routes(app, service, health)
    _answer_routes(app, service)
    app.add_middleware(NegotiationMiddleware, others=_OTHER_FORMS, answer=problems.refusal)
    app.add_middleware(RepeatedMiddleware, answer=problems.refusal)
    add_guard(app, keys, loopback_only)
    app.add_middleware(ProtocolMiddleware, server="this gateway server", answer=problems.refusal)
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


def _look_routes(app: FastAPI, service: Service, health: Callable[[], Health]) -> None:
    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        found = health()
        seconds = round(found.seconds_since_answer, 1)
        status = "behind" if found.behind else "ok"
        return JSONResponse({"status": status, "coordinator_silent_seconds": seconds})

    @app.get("/readyz")
    async def readyz() -> Response:
        return readiness(_not_ready(service, health()))

    @app.get("/metrics")
    async def metrics() -> Response:
        page = service.counters.page(service.catalogue.snapshot, health(), *service.backend.busy())
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [_card(service, name) for name in service.names()]})

    @app.get("/v1/models/{name}")
    async def model(name: str) -> JSONResponse:
        _check_name(service, name)
        return JSONResponse(_card(service, name))


def _not_ready(service: Service, health: Health) -> str | None:
    """Why the federation's models cannot be asked for; a coordinator that is away takes back none that is loaded."""
    served = service.catalogue.snapshot.models
    if not served and health.behind:
        return "no model of the federation is served yet; the server's log says why"
    missing = set(served.values()) - service.backend.loaded()
    return f"not loaded: {', '.join(sorted(model.name for model in missing))}" if missing else None


def _card(service: Service, name: str) -> Json:
    snapshot, base = service.catalogue.snapshot, service.base.weights_hash
    if name in (BASE, AUTO):
        return model_card(name, int(snapshot.since), 0, base, base)
    one = snapshot.models[name]
    return model_card(name, int(snapshot.since), one.version, one.digest, base)


def _answer_routes(app: FastAPI, service: Service) -> None:
    @app.post(_CHAT)
    async def chat(request: Request, wanted: ChatRequest) -> Response:
        _check(request, service, wanted)
        prompt = service.prompter.of_chat([message.plain() for message in wanted.messages])
        asked = _asked(service, wanted, [prompt], wanted.most_new_tokens, service.limits.output_tokens)
        return await _answered(request, service, wanted, asked, "chat")

    @app.post(_TEXTS)
    async def completion(request: Request, wanted: CompletionRequest) -> Response:
        _check(request, service, wanted)
        prompter = service.prompter
        prompts = [prompter.of_text(one) if isinstance(one, str) else prompter.of_tokens(one) for one in wanted.prompts]
        asked = _asked(service, wanted, prompts, wanted.max_tokens, _DEFAULT_TEXT_TOKENS)
        return await _answered(request, service, wanted, asked, "text")


def _check(request: Request, service: Service, wanted: ChatRequest | CompletionRequest) -> None:
    """First whether the model is there, for which every field means something; then what no schema tells."""
    form = EventStream.media_type if wanted.stream else JSON
    if excludes(request.headers.getlist("accept"), form):
        raise not_acceptable(form)
    try:
        _check_name(service, wanted.model)
    except ApiError as error:
        service.counters.refused[error.code] += 1
        raise
    if wanted.contradiction is not None:
        raise ApiError(400, "invalid_value", wanted.contradiction)


def _check_name(service: Service, name: str) -> None:
    if name not in service.names():
        there = ", ".join(service.names())
        raise ApiError(404, "model_not_found", f"there is no model {name[:80]!r}; there are: {there}", "model")


def _asked(
    service: Service,
    wanted: ChatRequest | CompletionRequest,
    prompts: Sequence[tuple[int, ...]],
    most: int | None,
    default: int,
) -> GenerationRequest:
    limit = service.limits.output_tokens
    if most is not None and most > limit:
        raise ApiError(400, "invalid_value", f"at most {limit} tokens are generated here, got {most}", "max_tokens")
    if len(prompts) * (wanted.n or 1) > MOST_CHOICES:
        raise ApiError(
            400, "invalid_value", f"prompts times n may be {MOST_CHOICES}, got {len(prompts)} x {wanted.n}", "n"
        )
    return GenerationRequest(
        wanted.model,
        tuple(prompts),
        wanted.n or 1,
        min(default, limit) if most is None else most,
        1.0 if wanted.temperature is None else wanted.temperature,
        1.0 if wanted.top_p is None else wanted.top_p,
        wanted.seed,
        wanted.alternatives if isinstance(wanted, ChatRequest) else wanted.logprobs,
        wanted.stops,
    )


async def _answered(
    request: Request, service: Service, wanted: ChatRequest | CompletionRequest, asked: GenerationRequest, kind: Kind
) -> Response:
    try:
        # A prompt to `auto` waits here until it is routed; nobody else does.
        answering = await _unless_gone(request.receive, service.begin(asked))
    except ApiError as error:
        service.counters.refused[error.code] += 1
        raise
    except BackendError as error:
        service.counters.refused[of_backend(error).code] += 1
        raise
    if answering is None:
        service.counters.refused["client_gone"] += 1
        return Response(status_code=_GONE)
    form = Form(kind, uuid.uuid4().hex, int(time.time()), answering.origin, service.prompter, asked.alternatives)
    if wanted.stream:
        return EventStream(answering, form, wanted.include_usage)
    async with answering:
        body = await _unless_gone(request.receive, _whole(answering, form))
    # Nobody reads the second one: its client is gone.
    return JSONResponse(body, headers=answering.origin.headers()) if body is not None else Response(status_code=_GONE)


async def _whole(answering: ActiveRequest, form: Form) -> Json:
    found: list[list[Chunk]] = [[] for _ in range(answering.asked.choices)]
    async with aclosing(answering.pieces()) as pieces:
        async for index, piece in pieces:
            found[index].append(piece)
    return form.whole([together(one) for one in found], answering.usage)


async def _unless_gone(receive: Receive, work: Coroutine[None, None, Result]) -> Result | None:
    """The result of `work`, or None, and the work given up, when the client goes away first."""
    doing, leaving = asyncio.create_task(work), asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await doing if doing.done() else None
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """An answer as server-sent events; gives everything back when it ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, answering: ActiveRequest, form: Form, include_usage: bool) -> None:
        super().__init__(headers={**answering.origin.headers(), "cache-control": "no-store"})
        del self.headers["content-length"]
        self._answering = answering
        self._form = form
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._answering:
            await _unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        async with aclosing(self._events()) as events:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes, None]:
        for opening in self._form.opening(self._answering.asked.choices):
            yield _event(opening)
        try:
            async with aclosing(self._answering.pieces()) as pieces:
                async for index, piece in pieces:
                    if piece.text or piece.finish or self._form.alternatives is not None:
                        yield _event(self._form.part(index, piece))
        except BackendError as error:
            # The status has long been sent; clients take an event with an error for what it is.
            yield _event(of_backend(error).body())
            return
        if self._include_usage:
            yield _event(self._form.closing(self._answering.usage))
        yield b"data: [DONE]\n\n"


def _event(body: Json) -> bytes:
    return b"data: " + json.dumps(body, allow_nan=False, separators=(",", ":")).encode() + b"\n\n"
