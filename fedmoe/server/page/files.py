"""Files of the page: those for everybody, and those for whoever may see the federation."""

from __future__ import annotations

from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fedmoe.wire.http.pages import BASE_SCRIPT, BASE_STYLE, PAGE_HEADERS, PageFile, plotly_response

_HERE = "fedmoe.server.page"
_PAGE_FILES = {"/": PageFile(_HERE, "page.html"), "/page.js": PageFile(_HERE, "page.js")}
_PLOTLY = "/plotly.js"
#: Path -> file for everybody, since they hold nothing of the federation.
LOGIN_FILES = {
    "/login": PageFile(_HERE, "login.html"),
    "/login.js": PageFile(_HERE, "login.js"),
    "/page.css": PageFile(_HERE, "page.css"),
    "/words.js": PageFile(_HERE, "words.js"),
    "/base.css": BASE_STYLE,
    "/base.js": BASE_SCRIPT,
}


class PageFiles:
    """Answers GET of the page's files, which come after authentication; everything else goes on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"] if scope["type"] == "http" and scope["method"] == "GET" else ""
        if path in _PAGE_FILES:
            await _PAGE_FILES[path].response(scope)(scope, receive, send)
        elif path == _PLOTLY:
            await plotly_response(scope)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def to_login() -> Response:
    """Send a browser that shows no token to the login page."""
    return RedirectResponse("/login", 303, dict(PAGE_HEADERS))
