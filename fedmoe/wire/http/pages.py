"""Pages for browsers: their own files and Plotly's script, with headers that let nothing else run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Scope

#: Plotly writes styles of its own into the page; nothing is ever evaluated.
_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
#: What every page is made of, by path: `base` files lie here.
SHARED = "fedmoe.wire.http"


@dataclass(frozen=True, slots=True)
class PageFile:
    """A file of a page: `name` lies in the folder `files` of `package`."""

    package: str
    name: str

    def response(self, scope: Scope) -> Response:
        """The file, or 304 where the browser has it."""
        return _response(_content(self), Path(self.name).suffix, scope)


BASE_STYLE, BASE_SCRIPT = PageFile(SHARED, "base.css"), PageFile(SHARED, "base.js")


def plotly_script() -> bytes | None:
    """Plotly's JavaScript out of the installed package, which is not imported; None where there is none."""
    # Importing plotly itself would cost the coordinator 60 MB.
    package = find_spec("plotly")
    if package is None or package.origin is None:
        return None
    return (Path(package.origin).parent / "package_data" / "plotly.min.js").read_bytes()


def plotly_response(scope: Scope) -> Response:
    """Plotly's JavaScript; without it a script that says nothing, and charts are left out."""
    return _response(_plotly(), ".js", scope)


def _response(content: tuple[bytes, str], suffix: str, scope: Scope) -> Response:
    body, tag = content
    headers = PAGE_HEADERS | {"ETag": tag}
    if Headers(scope=scope).get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(body, 200, headers, _TYPES[suffix])


@cache
def _content(file: PageFile) -> tuple[bytes, str]:
    return _tagged((files(file.package) / "files" / file.name).read_bytes())


@cache
def _plotly() -> tuple[bytes, str]:
    return _tagged(plotly_script() or b"// charts need: pip install 'fedmoe[web]'\n")


def _tagged(body: bytes) -> tuple[bytes, str]:
    return body, f'"{hashlib.sha256(body).hexdigest()[:32]}"'
