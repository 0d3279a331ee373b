"""Choice of the HTTP proxy by environment variables (HTTP_PROXY, NO_PROXY, ...), as curl does.

HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY count in upper and lower case, as they do for curl. What is on this
machine is always asked directly: a token for it must not reach a proxy.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

_PORTS = {"http": 80, "https": 443}
_SCHEMES = ("http", "https", "socks5", "socks5h")


class ConnectionSettingError(ValueError):
    """A URL or an environment variable for connections cannot be used; the message names it."""


@dataclass(frozen=True, slots=True)
class ProxyChoice:
    """A proxy to go through, and the variable that names it."""

    url: str
    variable: str

    @property
    def shown(self) -> str:
        """The same for people, without a password."""
        parts = urlsplit(self.url)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port} ({self.variable})"


def proxy_for(url: str, proxies: Mapping[str, str]) -> ProxyChoice | None:
    """The proxy for a URL, None to go directly; `proxies` as `urllib.request.getproxies` gives them.

    Raises `ConnectionSettingError` for a proxy that cannot be used. Variables for other addresses are not looked at.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    scheme = next((one for one in (parts.scheme, "all") if proxies.get(one)), None)
    if scheme is None or is_loopback(host):
        return None
    entries, port = proxies.get("no", "").split(","), parts.port or _PORTS.get(parts.scheme, 0)
    if any(_matches(entry.strip().lower(), parts.scheme, host, port) for entry in entries):
        return None
    named = proxies[scheme]
    variable = f"{scheme.upper()}_PROXY"
    proxy = named if "://" in named else f"http://{named}"
    _check(proxy, variable, host)
    return ProxyChoice(proxy, variable)


def is_loopback(host: str) -> bool:
    """Whether a host names this machine itself: localhost, 127.0.0.0/8 in any spelling, ::1, and the empty address."""
    if host.lower() == "localhost" or host.lower().endswith(".localhost"):
        return True
    address = _address(host)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address is not None and (address.is_loopback or address.is_unspecified)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        pass
    try:
        # As the system reads it: 127.1 and 0x7f000001 are addresses too.
        return ipaddress.IPv4Address(socket.inet_aton(host)) if host[-1:].isalnum() else None
    except (OSError, UnicodeError):
        return None


def _matches(entry: str, scheme: str, host: str, port: int) -> bool:
    """Whether an entry of NO_PROXY covers the address: *, host, host:port, .domain, an address or a network."""
    if "://" in entry:
        wanted, _, entry = entry.partition("://")
        if wanted not in ("all", scheme):
            return False
    if entry in ("", "*"):
        return entry == "*"
    network = _network(entry)
    if network is None and entry.rpartition(":")[2].isdigit():
        entry, _, number = entry.rpartition(":")
        if int(number) != port:
            return False
        network = _network(entry)
    if network is not None:
        address = _address(host)
        return address is not None and address.version == network.version and address in network
    if entry.startswith(("*.", ".")):
        return host.endswith("." + entry.lstrip("*."))
    return host == entry or host.endswith("." + entry)


def _network(entry: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(entry.replace("[", "").replace("]", ""), strict=False)
    except ValueError:
        return None


def _check(proxy: str, variable: str, host: str) -> None:
    """Refuse what no request could go through, in words."""
    instead = f"correct {variable}, or put {host} into NO_PROXY to go there directly"
    try:
        parts: SplitResult = urlsplit(proxy)
        usable = bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConnectionSettingError(f"{variable} is no URL of a proxy (expected one like http://HOST:3128); {instead}")
    if parts.scheme not in _SCHEMES:
        raise ConnectionSettingError(
            f"{variable} names a proxy of the kind {parts.scheme!r}; {', '.join(_SCHEMES)} are known: {instead}"
        )
    if parts.scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        raise ConnectionSettingError(
            f"{variable} names a SOCKS proxy, which takes the package socksio; run: pip install socksio, or {instead}"
        )
