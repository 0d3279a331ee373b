"""HTTP routes of the page: the live status as server-sent events, login and logout of a browser."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.security import principal_of
from fedmoe.server.page.login import own_page, with_cookie, without_cookie
from fedmoe.server.routes.app_state import parts_of
from fedmoe.server.routes.weight_responses import refuse_without
from fedmoe.wire.http.bearer import bearer_of

_EVENTS = "text/event-stream"
router = APIRouter()


@router.get("/live", response_class=Response)
async def live(request: Request) -> StreamingResponse:
    refuse_without(request, _EVENTS)
    stream = parts_of(request).live.stream(principal_of(request), request.headers.get("last-event-id"))
    # Proxies that gather answers would keep each event until there are many.
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(stream, headers=headers, media_type=_EVENTS)


@router.post("/session", status_code=204, response_class=Response)
async def log_in(request: Request) -> Response:
    """Keep the token of this request in the browser that sent it."""
    token = bearer_of(request.headers.get("authorization"))
    if token is None or not own_page(request.scope):
        raise RefusedError("forbidden", "only the login page logs a browser in.", "Open /login.")
    return with_cookie(request.scope, token)


@router.post("/session/end", status_code=204, response_class=Response)
async def log_out(request: Request) -> Response:
    return without_cookie(request.scope)
