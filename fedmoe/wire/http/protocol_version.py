"""Protocol middleware: names this server's protocol, refuses peers too far from it."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fedmoe import __version__
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.contract.versions import PROTOCOL, PROTOCOL_HEADER, mismatch
from fedmoe.wire.http.middleware import RefusalMiddleware, with_header


class ProtocolMiddleware(RefusalMiddleware):
    """Names this server's protocol in every answer, and refuses requests of one too far from it.

    Requests without a number are taken: they come from earlier versions, and from programs that are none of ours.
    """

    def __init__(self, app: ASGIApp, server: str, refuse: Callable[[RefusedError], Response]) -> None:
        def refuse_with_upgrade(error: RefusedError) -> Response:
            answer = refuse(error)
            answer.headers["Upgrade"] = f"fedmoe/{PROTOCOL}"
            return answer

        super().__init__(app, refuse_with_upgrade)
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        named = with_header(send, PROTOCOL_HEADER, str(PROTOCOL)) if scope["type"] == "http" else send
        await super().__call__(scope, receive, named)

    def refusal(self, scope: Scope) -> RefusedError | None:
        return mismatch(Headers(scope=scope).get(PROTOCOL_HEADER), self._server, "the client", __version__)
