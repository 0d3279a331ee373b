"""Middleware of both servers: HEAD as GET, protocol version, `Accept`; refuses cross-site and ambiguous requests."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmoe import __version__
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.contract.messages import SAFETENSORS
from fedmoe.wire.contract.versions import PROTOCOL, PROTOCOL_HEADER, mismatch

#: Answered without a token: whether the process lives, and whether it can do its work.
OPEN_PATHS = frozenset({"/healthz", "/readyz"})
#: Headers that decide something here and have one value; those that are lists may come in several lines.
_ONE_VALUE = frozenset({"authorization", "content-length", "content-type", "fedmoe-protocol", "host", "user-agent"})
JSON = "application/json"
_MOST_RANGES = 256


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


class RepeatedMiddleware(RefusalMiddleware):
    """Refuses requests that give a parameter or a single-valued header twice."""

    def refusal(self, scope: Scope) -> RefusedError | None:
        what = repeated(scope["query_string"], scope["headers"])
        if what is None:
            return None
        return RefusedError("malformed", f"{what} was given more than once; it has one value.", "Send it once.")


def repeated(query: bytes, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """What a request says more than once, in words; None where everything is clear."""
    names = Counter(name.lower().decode("latin-1") for name, _ in headers)
    twice = sorted(name for name in _ONE_VALUE if names[name] > 1)
    if twice:
        return f"the header {twice[0]}"
    if b"&" not in query:
        return None
    keys = Counter(key for key, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    return next((f"the parameter {key[:80]!r}" for key, count in keys.items() if count > 1), None)


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


class CrossSiteMiddleware(RefusalMiddleware):
    """For a server without tokens: takes nothing that a page of another site makes a browser send.

    A browser on this machine reaches a server on loopback. What it cannot hide is the name it asked for (`Host`), the
    page that asked (`Origin`), and how far that page is from the server (`Sec-Fetch-Site`, of every current browser).
    With `loopback_only` requests must be addressed to this machine as well; `remedy` says what to do about one that is
    not.
    """

    def __init__(
        self, app: ASGIApp, loopback_only: bool, remedy: str, refuse: Callable[[RefusedError], Response]
    ) -> None:
        super().__init__(app, refuse)
        self._loopback_only = loopback_only
        self._remedy = remedy

    def refusal(self, scope: Scope) -> RefusedError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self._loopback_only and (error := foreign_host(host, self._remedy)):
            return error
        return foreign_page(host, headers.getlist("sec-fetch-site"), headers.getlist("origin"))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def foreign_host(host: str, remedy: str) -> RefusedError | None:
    """What is wrong with a `Host` that is not this machine: a web page that rebinds its name still sends it."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if is_loopback(name):
        return None
    asked = "where no token or key is asked for only requests addressed to this machine are taken"
    return RefusedError("host_not_allowed", f"{asked}, got Host {host[:80]!r}.", remedy)


def foreign_page(host: str, sites: Sequence[str], origins: Sequence[str]) -> RefusedError | None:
    """What is wrong with a request of a page that is not the server's own, by all its `Sec-Fetch-Site` and `Origin`.

    Another port of this machine is another page too: browsers call it `same-site`.
    """
    own = (f"http://{host}".lower(), f"https://{host}".lower())
    foreign = [f"Sec-Fetch-Site {site[:80]!r}" for site in sites if site.strip().lower() not in ("same-origin", "none")]
    foreign += [f"Origin {origin[:80]!r}" for origin in origins if origin.strip().lower() not in own]
    if not foreign:
        return None
    asked = "where no token or key is asked for, nothing is taken that a page of another site makes a browser send"
    return RefusedError("cross_site", f"{asked}, got {foreign[0]}.", "Ask from a program, not from a web page.")


class HeadMiddleware:
    """Answers HEAD as GET without the body; stands before all others, which then see a GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        state = {**scope.get("state", {}), "head": True}
        await self._app({**scope, "method": "GET", "state": state}, receive, without_body)


def is_head(request: Request) -> bool:
    """Whether the body of the answer goes nowhere, so that it need not be made."""
    return bool(getattr(request.state, "head", False))


def is_open(scope: Scope) -> bool:
    """Whether a request needs no token."""
    return scope["path"] in OPEN_PATHS and scope["method"] == "GET"


def readiness(reason: str | None) -> Response:
    """The answer of `/readyz`: 200, or 503 with the reason, in words that anybody may read."""
    if reason is None:
        return JSONResponse({"status": "ready"})
    return JSONResponse({"status": "not ready", "reason": reason}, 503, {"Retry-After": "5"})


def allowed(request: Request, headers: Mapping[str, str] | None) -> dict[str, str]:
    """The headers of a refusal; `Allow` of a 405 has every method of the path, and HEAD where there is GET."""
    answer_headers = dict(headers or {})
    if "Allow" in answer_headers:
        routes = [route for route in request.app.routes if isinstance(route, Route)]
        matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
        methods = {method for route in matching for method in route.methods or ()}
        answer_headers["Allow"] = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    return answer_headers


def weight_form(accept: Sequence[str]) -> str | None:
    """JSON or safetensors, by all `Accept` headers of a request; None if it excludes what could be sent.

    Safetensors have to be named, or be the only form that is left; named with the same weight they come first.
    """
    ranges = _ranges(accept)
    as_json, as_tensors = _weight(ranges, JSON), _weight(ranges, SAFETENSORS)
    if as_tensors and (as_json == 0 or (SAFETENSORS in ranges and as_tensors >= (as_json or 0.0))):
        return SAFETENSORS
    return None if as_json == 0 else JSON


def excludes(accept: Sequence[str], form: str) -> bool:
    """Whether a request says that it never takes this media type: a weight of 0, by the nearest range that covers it.

    What is merely not named may be sent: most programs name nothing of use.
    """
    return bool(accept) and _weight(_ranges(accept), form) == 0


def _weight(ranges: dict[str, float], form: str) -> float | None:
    """The weight of a media type by the nearest range that covers it; None where none does."""
    return next((ranges[media] for media in (form, f"{form.partition('/')[0]}/*", "*/*") if media in ranges), None)


def _ranges(accept: Sequence[str]) -> dict[str, float]:
    """Media range -> weight; of one that is named twice the smaller, so that 0 stays never."""
    ranges: dict[str, float] = {}
    for entry in ",".join(accept).split(",")[:_MOST_RANGES]:
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        values = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parameters)}
        weight = _number(values.pop("q", "1"))
        if weight or not values:  # with parameters of its own it is a variant that is excluded, which we do not send
            ranges[name] = min(weight, ranges.get(name, 1.0))
    return ranges


def _number(text: str) -> float:
    """A weight from 0 to 1; what is none counts as 1, as if it were not there."""
    try:
        return min(max(float(text), 0.0), 1.0) if text.isascii() and not text.strip("0123456789.") else 1.0
    except ValueError:
        return 1.0


class NegotiationMiddleware(RefusalMiddleware):
    """Refuses callers that never take JSON where there is nothing else; paths in `others` have another form."""

    def __init__(self, app: ASGIApp, others: frozenset[str], refuse: Callable[[RefusedError], Response]) -> None:
        super().__init__(app, refuse)
        self._others = others

    def refusal(self, scope: Scope) -> RefusedError | None:
        wrong = scope["path"] not in self._others and excludes(Headers(scope=scope).getlist("accept"), JSON)
        return not_acceptable(JSON) if wrong else None


def not_acceptable(form: str) -> RefusedError:
    """The refusal of a caller that excludes the only form there is."""
    return RefusedError(
        "not_acceptable",
        f"this is answered as {form}, which the request's Accept header excludes (q=0).",
        f"Send 'Accept: {form}', or none.",
    )
