"""Health routes: HEAD as GET, and the paths that need no token."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Answered without a token: whether the process lives, and whether it can do its work.
OPEN_PATHS = frozenset({"/healthz", "/readyz"})


class HeadMiddleware:
    """Answers HEAD as GET without the body; stands before all others, which then see a GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        state = {**scope.get("state", {}), "head": True}
        await self._app({**scope, "method": "GET", "state": state}, receive, without_body)


def is_head(request: Request) -> bool:
    """Whether the body of the answer goes nowhere, so that it need not be made."""
    return bool(getattr(request.state, "head", False))


def is_open(scope: Scope) -> bool:
    """Whether a request needs no token."""
    return scope["path"] in OPEN_PATHS and scope["method"] == "GET"


def readiness(reason: str | None) -> Response:
    """The answer of `/readyz`: 200, or 503 with the reason, in words that anybody may read."""
    if reason is None:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "not ready", "reason": reason}, 503, {"Retry-After": "5"})
