"""Login of a browser: a link that works once, or a token that is pasted, becomes a cookie that no script can read."""

from __future__ import annotations

import time
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fedmoe.server.access.tokens import TokenGate
from fedmoe.server.page.files import LOGIN_FILES, to_login
from fedmoe.wire.http.bearer import bearer_of, hash_token, new_token
from fedmoe.wire.http.middleware import foreign_page

COOKIE = "fedmoe_token"
#: How long a link of a start works, and a login by it, in seconds.
LINK_SECONDS = 15 * 60.0
SESSION_SECONDS = 30 * 86_400
_SESSION = "/session"
#: The label of tokens that nobody but the browser which opened a link has.
BY_LINK = "login by a link"


class LoginLinks:
    """Codes of links that work once and for a while; in memory only, so that none outlives its process."""

    def __init__(self, gate: TokenGate, clock: Callable[[], float] = time.monotonic) -> None:
        self._gate = gate
        self._clock = clock
        self._codes: dict[str, float] = {}

    def new(self) -> str:
        """A code that makes its first user an administrator."""
        code = new_token("fml")
        self._codes[hash_token(code)] = self._clock() + LINK_SECONDS
        return code

    def exchange(self, code: str) -> str | None:
        """A token for the code, which is used up; None for no code, or one that was used or is over."""
        until = self._codes.pop(hash_token(code), None)
        if until is None or self._clock() > until:
            return None
        token = new_token()
        self._gate.add(token, "admin", expires_in=SESSION_SECONDS, label=BY_LINK)
        return token


class LoginMiddleware:
    """Stands before authentication: shows the login page, takes links, and lets the page's cookie stand for its token.

    The cookie counts only where the request comes from a page of this coordinator.
    """

    def __init__(self, app: ASGIApp, gate: TokenGate, links: LoginLinks) -> None:
        self._app = app
        self._gate = gate
        self._links = links

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] in LOGIN_FILES:
            await LOGIN_FILES[scope["path"]].response(scope)(scope, receive, send)
            return
        if scope["type"] != "http" or not self._gate.required:
            await self._app(scope, receive, send)
            return
        method, path, headers = scope["method"], scope["path"], Headers(scope=scope)
        shown = bearer_of(headers.get("authorization"))
        if method == "POST" and path == _SESSION and shown is not None and own_page(scope):
            token = self._links.exchange(shown)
            if token is not None:
                await with_cookie(scope, token)(scope, receive, send)
                return
        cookie = cookie_of(headers) if shown is None and own_page(scope) else None
        if cookie is not None:
            scope = {**scope, "headers": [*scope["headers"], (b"authorization", f"Bearer {cookie}".encode("latin-1"))]}
        elif method == "GET" and path == "/" and shown is None:
            await to_login()(scope, receive, send)
            return
        await self._app(scope, receive, send)


def cookie_of(headers: Headers) -> str | None:
    """The token in the page's cookie."""
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel is not None and morsel.value else None


def own_page(scope: Scope) -> bool:
    """Whether a request may be one of a page of this server; one that changes something must say that it is."""
    headers = Headers(scope=scope)
    sites, origins = headers.getlist("sec-fetch-site"), headers.getlist("origin")
    if foreign_page(headers.get("host", ""), sites, origins) is not None:
        return False
    return scope["method"] == "GET" or bool(origins) or sites == ["same-origin"]


def with_cookie(scope: Scope, token: str) -> Response:
    """An answer that logs a browser in."""
    return _session(scope, token, SESSION_SECONDS)


def without_cookie(scope: Scope) -> Response:
    """An answer that logs a browser out."""
    return _session(scope, "", 0)


def _session(scope: Scope, token: str, seconds: int) -> Response:
    answer = Response(status_code=204)
    secure = scope["scheme"] == "https"
    answer.set_cookie(COOKIE, token, max_age=seconds, secure=secure, httponly=True, samesite="strict")
    return answer
