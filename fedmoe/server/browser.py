"""Where no token is asked for: requests that a page of another site makes a browser send are refused.

A browser on this machine reaches a server on loopback. What it cannot hide is the name it asked for (`Host`), the page
that asked (`Origin`), and how far that page is from the server (`Sec-Fetch-Site`, of every current browser).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Foreign:
    """Why a request is not taken: a status, a code, and what was got."""

    status: int
    code: str
    detail: str


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def foreign_host(host: str) -> Foreign | None:
    """What is wrong with a `Host` that is not this machine: a web page that rebinds its name still sends it."""
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    if is_loopback(name):
        return None
    detail = (
        f"where no token or key is asked for only requests addressed to this machine are taken, got Host {host[:80]!r}."
    )
    return Foreign(421, "host_not_allowed", detail)


def foreign_page(host: str, sites: Sequence[str], origins: Sequence[str]) -> Foreign | None:
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


def _of_another_site(got: str) -> Foreign:
    asked = "where no token or key is asked for, nothing is taken that a page of another site makes a browser send"
    return Foreign(403, "cross_site", f"{asked}, got {got}.")
