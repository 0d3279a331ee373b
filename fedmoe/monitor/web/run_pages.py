"""A small server for the page of runs: its files, live messages, and episodes; for browsers of this machine only."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from fedmoe.monitor.interactive.page import plotly_library
from fedmoe.monitor.web.run_messages import fingerprint, runs_message
from fedmoe.wire.http.middleware import foreign_page
from fedmoe.wire.http.serving import listen, own_signals, server_of

#: The folder of a run, a policy or None, and an order -> episodes as JSON values. Raises FileNotFoundError.
Episodes = Callable[[Path, str | None, str], Sequence[Mapping[str, object]]]
HOST = "127.0.0.1"
LEAST_SECONDS = 0.5
# Making messages may take this share of the time.
_SHARE = 0.1
_FILES = {"/": "runs.html", "/runs.js": "runs.js", "/runs.css": "runs.css"}
_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class RunPages:
    """The newest message of the runs, made once for all pages, at most twice a second; for one event loop."""

    def __init__(self, folders: Sequence[Path], episodes: Episodes) -> None:
        self.folders = tuple(folders)
        self.episodes = episodes
        #: Says when all streams are to end.
        self.stopping: Callable[[], bool] = lambda: False
        #: Messages that were made since the start.
        self.made = 0
        self._lock = asyncio.Lock()
        self._newest = ("", "")
        self._next_at = 0.0

    async def stream(self, last_id: str | None) -> AsyncIterator[str]:
        """Server-sent events: the runs now, unless `last_id` is of them, and again whenever their records change."""
        yield "retry: 1000\n\n"
        while not self.stopping():
            name, text = await self._current()
            if name != last_id:
                last_id = name
                yield f"id: {name}\ndata: {text}\n\n"
            await asyncio.sleep(LEAST_SECONDS)

    async def _current(self) -> tuple[str, str]:
        async with self._lock:
            now = time.monotonic()
            if now < self._next_at:
                return self._newest
            name = await run_in_threadpool(fingerprint, self.folders)
            if name != self._newest[0]:
                # The name is from before the reading: what comes in between is read again.
                self._newest = (name, await run_in_threadpool(runs_message, self.folders))
                self.made += 1
            self._next_at = time.monotonic() + max(LEAST_SECONDS, (time.monotonic() - now) / _SHARE)
            return self._newest


def runs_app(pages: RunPages) -> Starlette:
    """The page's routes; raises ModuleNotFoundError where plotly is not installed."""
    content = {path: (files("fedmoe.monitor.web") / "files" / name).read_text("utf-8") for path, name in _FILES.items()}
    content["/plotly.js"] = plotly_library()

    async def file(request: Request) -> Response:
        path = request.url.path
        kind = _TYPES[_FILES.get(path, "plotly.js").rsplit(".", 1)[1]]
        return Response(content[path], 200, _HEADERS, kind)

    async def live(request: Request) -> Response:
        refused = _foreign(request)
        if refused is not None:
            return refused
        stream = pages.stream(request.headers.get("last-event-id"))
        return StreamingResponse(stream, 200, _HEADERS, "text/event-stream")

    async def episodes(request: Request) -> Response:
        refused = _foreign(request)
        return refused if refused is not None else await run_in_threadpool(_episodes, pages, request)

    routes = [Route(path, file) for path in content] + [Route("/live", live), Route("/episodes", episodes)]
    # A name of another site that points to this machine is no name of this server.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=routes, middleware=[hosts])


def serve_runs(pages: RunPages, port: int, ready: Callable[[str], None]) -> None:
    """Serve until a signal; `ready` is told the address. Raises PortInUseError, ModuleNotFoundError."""
    server = server_of(runs_app(pages))
    pages.stopping = lambda: server.should_exit
    with listen(HOST, port) as listener, own_signals(server):
        ready(f"http://{HOST}:{listener.getsockname()[1]}/")
        server.run(sockets=[listener])


def _foreign(request: Request) -> Response | None:
    headers = request.headers
    error = foreign_page(headers.get("host", ""), headers.getlist("sec-fetch-site"), headers.getlist("origin"))
    return None if error is None else JSONResponse({"detail": str(error)}, 403, _HEADERS)


def _episodes(pages: RunPages, request: Request) -> Response:
    query = request.query_params
    number, order = query.get("run", "0"), query.get("order", "newest")
    if not (number.isascii() and number.isdigit() and int(number) < len(pages.folders)):
        return JSONResponse({"detail": f"run is 0 to {len(pages.folders) - 1}, got {number[:20]!r}"}, 422, _HEADERS)
    if order not in ("newest", "lowest", "highest"):
        return JSONResponse({"detail": f"order is newest, lowest or highest, got {order[:20]!r}"}, 422, _HEADERS)
    try:
        rows = pages.episodes(pages.folders[int(number)], query.get("policy") or None, order)
    except FileNotFoundError:
        rows = []
    return Response(json.dumps(rows), 200, _HEADERS, "application/json")
