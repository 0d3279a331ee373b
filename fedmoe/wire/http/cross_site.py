"""Cross-site protection for servers without tokens: refuses requests that another site's page sends.

A browser on this machine reaches a server on loopback. What it cannot hide is the name it asked for (`Host`), the page
that asked (`Origin`), and how far that page is from the server (`Sec-Fetch-Site`, of every current browser).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.http.middleware import RefusalMiddleware


class CrossSiteMiddleware(RefusalMiddleware):
    """For a server without tokens: takes nothing that a page of another site makes a browser send.

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
    detail = (
        f"where no token or key is asked for only requests addressed to this machine are taken, got Host {host[:80]!r}."
    )
    return RefusedError("host_not_allowed", detail, remedy)


def foreign_page(host: str, sites: Sequence[str], origins: Sequence[str]) -> RefusedError | None:
    """What is wrong with a request of a page that is not the server's own, by all its `Sec-Fetch-Site` and `Origin`.

    Another port of this machine is another page too: browsers call it `same-site`.
    """
    for site in sites:
        if site.strip().lower() not in ("same-origin", "none"):
            return _of_another_site(f"Sec-Fetch-Site {site[:80]!r}")
    for origin in origins:
        if origin.strip().lower() not in (f"http://{host}".lower(), f"https://{host}".lower()):
            return _of_another_site(f"Origin {origin[:80]!r}")
    return None


def _of_another_site(got: str) -> RefusedError:
    asked = "where no token or key is asked for, nothing is taken that a page of another site makes a browser send"
    return RefusedError("cross_site", f"{asked}, got {got}.", "Ask from a program, not from a web page.")
