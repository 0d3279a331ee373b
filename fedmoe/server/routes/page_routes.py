"""HTTP routes of the page: the live status as server-sent events, login and logout of a browser."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.security import Principal, principal_of
from fedmoe.server.federation_status import federation_status
from fedmoe.server.page.login import BY_LINK, own_page, with_cookie, without_cookie
from fedmoe.server.routes.app_state import parts_of
from fedmoe.server.routes.weight_responses import refuse_without
from fedmoe.server.service import CoordinatorService
from fedmoe.wire.http.bearer import bearer_of
from fedmoe.wire.http.live import EVENTS, LiveState, LiveStates

# What workers do changes by time too: they turn silent.
_OLDEST_SECONDS = 5.0
router = APIRouter()


def live_status(service: CoordinatorService) -> LiveStates[Principal]:
    """Streams of the federation's status, made once for all who may see the same."""

    def make(principal: Principal) -> LiveState:
        status = federation_status(service, principal)
        return LiveState(f"{status.incarnation}-{status.revision}-{status.at:.3f}", status.model_dump_json())

    return LiveStates(make, lambda: service.activity.revision + service.heartbeats.count, _OLDEST_SECONDS)


@router.get("/live", response_class=Response)
async def live(request: Request) -> StreamingResponse:
    refuse_without(request, EVENTS)
    principal = principal_of(request)
    # Without the token, which does not change what is seen.
    return parts_of(request).live.response(request, Principal(principal.role, principal.worker, principal.experts))


@router.post("/session", status_code=204, response_class=Response)
async def log_in(request: Request) -> Response:
    """Keep the token of this request in the browser that sent it."""
    token = bearer_of(request.headers.get("authorization"))
    if token is None or not own_page(request.scope):
        raise RefusedError("forbidden", "only the login page logs a browser in.", "Open /login.")
    return with_cookie(request.scope, token)


@router.post("/session/end", status_code=204, response_class=Response)
async def log_out(request: Request) -> Response:
    """Take the cookie back; a token that was made for this login ends, one that was pasted is its owner's to revoke."""
    token, gate = principal_of(request).token, parts_of(request).tokens
    answer = without_cookie(request.scope)
    if token and gate.label(token) == BY_LINK:
        # Once it is sent: what is under way with a revoked token is cut off.
        answer.background = BackgroundTask(gate.revoke, token)
    return answer
