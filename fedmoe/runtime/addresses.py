"""The names and addresses of this machine, and the one to give to others."""

from __future__ import annotations

import socket

import psutil

_ALL = ("", "0.0.0.0", "::")  # noqa: S104


def machine_names(host: str) -> list[str]:
    """The names and addresses by which a coordinator that listens on `host` may be known."""
    addresses = {
        address.address
        for addresses in psutil.net_if_addrs().values()
        for address in addresses
        if address.family in (socket.AF_INET, socket.AF_INET6) and "%" not in address.address
    }
    named = {socket.gethostname(), "localhost"} | ({host} if host not in _ALL else set())
    return sorted(named | addresses | {"127.0.0.1", "::1"})


def reachable_host(host: str) -> str:
    """The address to give to others, in the form of a URL: `host`, or for all addresses the one that leads outside."""
    if host not in _ALL:
        return f"[{host}]" if ":" in host else host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Nothing is sent: this asks for the way to an address that nobody has (RFC 5737).
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
