"""Base of our middleware: refuse a request before any other work, add a header to every response."""

from __future__ import annotations

from collections.abc import Callable

from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmoe.runtime.errors import RefusedError


class RefusalMiddleware:
    """Answers requests that `refusal` refuses and passes all others on; `refuse` writes the server's refusals."""

    def __init__(self, app: ASGIApp, refuse: Callable[[RefusedError], Response]) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self.refusal(scope) if scope["type"] == "http" else None
        await (self._app if error is None else self._refuse(error))(scope, receive, send)

    def refusal(self, scope: Scope) -> RefusedError | None:
        """Why a request is refused; None where it is not."""
        raise NotImplementedError


def with_header(send: Send, name: str, value: str) -> Send:
    """`send`, with one more header on the answer."""

    async def send_with_header(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message)[name] = value
        await send(message)

    return send_with_header
