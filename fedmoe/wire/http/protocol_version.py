"""Protocol middleware: names this server's protocol, refuses peers too far from it."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmoe import __version__
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.contract.versions import PROTOCOL, PROTOCOL_HEADER, mismatch


class ProtocolMiddleware:
    """Names this server's protocol in every answer, and refuses requests of one too far from it; `answer` writes that.

    Requests without a number are taken: they come from earlier versions, and from programs that are none of ours.
    """

    def __init__(self, app: ASGIApp, server: str, answer: Callable[[RefusedError], Response]) -> None:
        self._app = app
        self._server = server
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[PROTOCOL_HEADER] = str(PROTOCOL)
            await send(message)

        told = Headers(scope=scope).get(PROTOCOL_HEADER)
        refused = mismatch(told, self._server, "the client", __version__)
        if refused is None:
            await self._app(scope, receive, send_named)
            return
        answer = self._answer(refused)
        answer.headers["Upgrade"] = f"fedmoe/{PROTOCOL}"
        await answer(scope, receive, send_named)
