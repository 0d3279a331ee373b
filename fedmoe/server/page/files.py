"""Files of the page, with the headers that keep a browser from running anything else."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

#: Path -> file, for whoever may see the federation; the others for everybody, since they hold nothing of it.
PAGE_FILES = {"/": "page.html", "/page.js": "page.js", "/plotly.js": "plotly.min.js"}
LOGIN_FILES = {"/login": "login.html", "/login.js": "login.js", "/page.css": "page.css", "/words.js": "words.js"}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
#: Plotly writes styles of its own into the page; nothing is ever evaluated.
_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class PageFiles:
    """Answers GET of the page's files, which come after authentication; everything else goes on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] in PAGE_FILES:
            await file_response(scope, PAGE_FILES[scope["path"]])(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def file_response(scope: Scope, name: str) -> Response:
    """A file of the page, or 304 where the browser has it."""
    body, tag = _content(name)
    if not body:
        return Response("// charts need: pip install 'fedmoe[web]'\n", 200, dict(_HEADERS), "text/javascript")
    headers = _HEADERS | {"ETag": tag}
    if Headers(scope=scope).get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, 200, headers, _TYPES[Path(name).suffix])


def to_login() -> Response:
    """Send a browser that shows no token to the login page."""
    return RedirectResponse("/login", 303, dict(_HEADERS))


@cache
def _content(name: str) -> tuple[bytes, str]:
    """The bytes of a file and its ETag; no bytes where the package that has it is not installed."""
    if name == "plotly.min.js":
        # Its own folder of files; importing plotly itself would cost the coordinator 60 MB.
        package = find_spec("plotly")
        if package is None or package.origin is None:
            return b"", ""
        body = (Path(package.origin).parent / "package_data" / name).read_bytes()
    else:
        body = (files("fedmoe.server.page") / "files" / name).read_bytes()
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'
