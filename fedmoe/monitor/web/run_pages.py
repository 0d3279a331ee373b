"""A small server for the page of runs: its files, live messages, and episodes; for browsers of this machine only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fedmoe.monitor.web.run_messages import RunMessages
from fedmoe.wire.http.live import LiveState, LiveStates
from fedmoe.wire.http.middleware import foreign_page
from fedmoe.wire.http.pages import BASE_SCRIPT, BASE_STYLE, PAGE_HEADERS, PageFile, plotly_response, plotly_script
from fedmoe.wire.http.serving import listen, own_signals, run, server_of

HOST = "127.0.0.1"
#: Episodes that the page lists; as JSONL all are given that the filter takes.
MOST_LISTED = 50
# Reading long runs may take this share of the time.
_SHARE = 0.1
_HERE = "fedmoe.monitor.web"
_FILES = {
    "/": PageFile(_HERE, "runs.html"),
    "/runs.js": PageFile(_HERE, "runs.js"),
    "/figures.js": PageFile(_HERE, "figures.js"),
    "/runs.css": PageFile(_HERE, "runs.css"),
    "/base.js": BASE_SCRIPT,
    "/base.css": BASE_STYLE,
}
_ORDERS = ("newest", "lowest", "highest")


@dataclass(frozen=True, slots=True)
class EpisodeFilter:
    """Which episodes of a run are asked for: with this policy, its mean reward in bounds, so many, in an order."""

    policy: str | None = None
    order: str = "newest"
    least: float | None = None
    most: float | None = None
    limit: int | None = MOST_LISTED


#: The folder of a run and a filter -> episodes as JSON values. Raises FileNotFoundError.
Episodes = Callable[[Path, EpisodeFilter], Sequence[Mapping[str, object]]]


class RunPages:
    """The runs in some folders as pages show them, and their episodes; `live` has the newest state of all runs."""

    def __init__(self, folders: Sequence[Path], episodes: Episodes) -> None:
        self.folders = tuple(folders)
        self.episodes = episodes
        messages = RunMessages(self.folders)

        def make(view: None) -> LiveState:
            name = messages.fingerprint()
            return LiveState(name, messages.text())

        self.live = LiveStates[None](make, messages.fingerprint, share=_SHARE)


def runs_app(pages: RunPages) -> Starlette:
    """The page's routes; raises ModuleNotFoundError where plotly is not installed."""
    if plotly_script() is None:
        raise ModuleNotFoundError("No module named 'plotly'", name="plotly")

    async def file(request: Request) -> Response:
        return _FILES[request.url.path].response(request.scope)

    async def plotly(request: Request) -> Response:
        return plotly_response(request.scope)

    async def live(request: Request) -> Response:
        return pages.live.response(request, None)

    async def episodes(request: Request) -> Response:
        return await run_in_threadpool(_episodes, pages, request)

    routes = [Route(path, file) for path in _FILES]
    routes += [Route("/plotly.js", plotly), Route("/live", live), Route("/episodes", episodes)]
    # A name of another site that points to this machine is no name of this server.
    hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    return Starlette(routes=routes, middleware=[hosts, Middleware(_OwnPages)])


class _OwnPages:
    """Refuses what another site makes a browser send; a link from elsewhere may open the page itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope)
        headers = request.headers
        error = foreign_page(headers.get("host", ""), headers.getlist("sec-fetch-site"), headers.getlist("origin"))
        if error is None or request.url.path == "/":
            await self._app(scope, receive, send)
        else:
            await JSONResponse({"detail": str(error)}, 403, PAGE_HEADERS)(scope, receive, send)


def serve_runs(pages: RunPages, port: int, ready: Callable[[str], None]) -> None:
    """Serve until a signal; `ready` is told the address. Raises PortInUseError, ModuleNotFoundError."""
    server = server_of(runs_app(pages))
    with listen(HOST, port) as listener, own_signals(server):
        listener.listen()  # whoever is told the address may come at once
        ready(f"http://{HOST}:{listener.getsockname()[1]}/")
        run(server, listener, pages.live.close)


def _episodes(pages: RunPages, request: Request) -> Response:
    """The episodes that a query chooses, as a list, or with `form=jsonl` all of them as a file to keep."""
    query = request.query_params
    try:
        place = _run_of(pages, query.get("run", "0"))
        asked = EpisodeFilter(
            query.get("policy") or None,
            _order_of(query.get("order", "newest")),
            _reward_of(query, "least"),
            _reward_of(query, "most"),
        )
    except ValueError as error:
        return JSONResponse({"detail": str(error)}, 422, PAGE_HEADERS)
    whole = query.get("form") == "jsonl"
    try:
        rows = pages.episodes(pages.folders[place], replace(asked, limit=None) if whole else asked)
    except FileNotFoundError:
        rows = []
    if not whole:
        return Response(json.dumps(rows), 200, PAGE_HEADERS, "application/json")
    saved = PAGE_HEADERS | {"Content-Disposition": 'attachment; filename="episodes.jsonl"'}
    return Response("".join(json.dumps(row) + "\n" for row in rows), 200, saved, "application/x-ndjson")


def _run_of(pages: RunPages, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) < len(pages.folders)):
        raise ValueError(f"run is 0 to {len(pages.folders) - 1}, got {text[:20]!r}")
    return int(text)


def _order_of(text: str) -> str:
    if text not in _ORDERS:
        raise ValueError(f"order is newest, lowest or highest, got {text[:20]!r}")
    return text


def _reward_of(query: Mapping[str, str], name: str) -> float | None:
    """A bound of the reward; none where it is empty."""
    text = query.get(name, "").strip()
    try:
        value = float(text) if text else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{name} is a number or empty, got {text[:20]!r}")
    return value
