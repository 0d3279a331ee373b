"""The `Allow` header of a 405: all methods of the path, with HEAD where there is GET."""

from __future__ import annotations

from collections.abc import Mapping

from fastapi import Request
from starlette.routing import BaseRoute, Match, Route


def allowed(request: Request, headers: Mapping[str, str] | None) -> dict[str, str]:
    """The headers of a refusal; `Allow` has every method of the path, and HEAD where there is GET."""
    answer_headers = dict(headers or {})
    if "Allow" in answer_headers:
        methods = {method for route in request.app.routes for method in _methods(route, request)}
        answer_headers["Allow"] = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    return answer_headers


def _methods(route: BaseRoute, request: Request) -> set[str]:
    there = route.matches(request.scope)[0] is not Match.NONE
    return set(route.methods or ()) if there and isinstance(route, Route) else set()
