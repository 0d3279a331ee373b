"""HTTP transport to a coordinator: proxy, certificates, and a minimum download pace.

HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY count in upper and lower case, as they do for curl. What is on this
machine is always asked directly: a token for it must not reach a proxy.

A server that lets an answer trickle would hold a thread for ever: every byte ends the wait that a timeout bounds. So
what comes in after the first byte of an answer has to come at `LEAST_BYTES_PER_SECOND`, measured over `PACE_SECONDS`.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpcore2
import httpx2

from fedmoe.runtime.logs import warn
from fedmoe.wire.pin import FingerprintError, OtherKeyError, PinnedContext, split_pin

_PORTS = {"http": 80, "https": 443}
_SCHEMES = ("http", "https", "socks5", "socks5h")
LEAST_BYTES_PER_SECOND = 1 << 10
PACE_SECONDS = 20.0


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
    scheme = next((scheme for scheme in (parts.scheme, "all") if proxies.get(scheme)), None)
    if scheme is None or names_this_machine(host):
        return None
    entries, port = proxies.get("no", "").split(","), parts.port or _PORTS.get(parts.scheme, 0)
    if any(_matches(entry.strip().lower(), parts.scheme, host, port) for entry in entries):
        return None
    proxy_url = proxies[scheme] if "://" in proxies[scheme] else f"http://{proxies[scheme]}"
    proxy = ProxyChoice(proxy_url, f"{scheme.upper()}_PROXY")
    _check(proxy, host)
    return proxy


def names_this_machine(host: str) -> bool:
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
        own_scheme, _, entry = entry.partition("://")
        if own_scheme not in ("all", scheme):
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


def _check(proxy: ProxyChoice, host: str) -> None:
    """Refuse what no request could go through, in words."""
    instead = f"correct {proxy.variable}, or put {host} into NO_PROXY to go there directly"
    try:
        parts = urlsplit(proxy.url)
        scheme = parts.scheme if parts.hostname and parts.port != 0 else ""
    except ValueError:
        scheme = ""
    if not scheme:
        problem = f"is no URL of a proxy (expected one like http://HOST:3128); {instead}"
    elif scheme not in _SCHEMES:
        problem = f"names a proxy of the kind {scheme!r}; {', '.join(_SCHEMES)} are known: {instead}"
    elif scheme.startswith("socks") and importlib.util.find_spec("socksio") is None:
        problem = f"names a SOCKS proxy, which takes the package socksio; run: pip install socksio, or {instead}"
    else:
        return
    raise ConnectionSettingError(f"{proxy.variable} {problem}")


def address_of(url: str) -> tuple[str, str | None]:
    """A coordinator's URL without its fingerprint, and the fingerprint; raises `ConnectionSettingError`."""
    try:
        return split_pin(url)
    except FingerprintError as error:
        raise ConnectionSettingError(str(error)) from error


def check_url(url: str) -> None:
    """Raise `ConnectionSettingError` unless the URL names a host, by http or https, and perhaps a fingerprint."""
    url, _ = address_of(url)
    try:
        parts = httpx2.URL(url)
        reason = "" if parts.scheme in ("http", "https") and parts.host else "it names no host"
    except httpx2.InvalidURL as error:
        reason = str(error)
    if reason:
        raise ConnectionSettingError(f"{url!r} is not a usable URL ({reason}); expected one like http://10.0.0.1:5000")


def proxy_of(url: str, token: str | None) -> ProxyChoice | None:
    """The proxy that the environment names for a URL; warns of a token that the proxy can read."""
    proxy = proxy_for(url, getproxies())
    if proxy is not None and token and url.lower().startswith("http://"):
        warn(
            "token_passes_a_proxy",
            proxy=proxy.shown,
            url=url,
            fix="use https://, or put the host into NO_PROXY; the proxy can read the token",
        )
    return proxy


def transport_for(url: str, proxy: ProxyChoice | None, fingerprint: str | None = None) -> httpx2.HTTPTransport:
    """Connections to `url`, with a `fingerprint` only to who has that key.

    Raises `ConnectionSettingError` for a proxy or certificates that cannot be used.
    """
    proxied = None
    if proxy is not None:
        tls = urlsplit(proxy.url).scheme == "https"
        try:
            proxied = httpx2.Proxy(proxy.url, ssl_context=trusted_certificates() if tls else None)
        except (httpx2.InvalidURL, ValueError) as error:
            raise ConnectionSettingError(f"the proxy {proxy.variable} cannot be used: {error}") from error
    # Plain http needs no certificates, and must not fail over a variable that names them wrongly.
    encrypted = urlsplit(url).scheme == "https"
    context = trusted_certificates() if encrypted and not fingerprint else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if fingerprint:
        context = PinnedContext.of(fingerprint)
    transport = httpx2.HTTPTransport(verify=context, proxy=proxied)
    transport._pool._network_backend = _PacedBackend()
    return transport


def trusted_certificates() -> ssl.SSLContext:
    """The authorities this machine trusts, or those of SSL_CERT_FILE or SSL_CERT_DIR."""
    try:
        return httpcore2.default_ssl_context()
    except (OSError, ssl.SSLError) as error:
        name = "SSL_CERT_FILE" if os.environ.get("SSL_CERT_FILE") else "SSL_CERT_DIR"
        raise ConnectionSettingError(
            f"{name} names {os.environ.get(name, '')!r}, which cannot be used ({error}); it takes certificates of "
            "authorities in PEM form"
        ) from error


class _Pace:
    """How fast an answer comes in; a new request begins a new measurement."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since: float | None = None
        self._bytes = 0

    def sent(self) -> None:
        self._since = None

    def received(self, count: int) -> None:
        """Count what came; raises ReadTimeout when it was too little for too long."""
        now = self._clock()
        if self._since is None:
            self._since, self._bytes = now, 0
            return
        self._bytes += count
        seconds = now - self._since
        if seconds < PACE_SECONDS:
            return
        if self._bytes < LEAST_BYTES_PER_SECOND * seconds:
            raise httpcore2.ReadTimeout(f"the answer trickles: {self._bytes} bytes in {seconds:.0f} s")
        self._since, self._bytes = now, 0


class _PacedStream(httpcore2.NetworkStream):
    """A connection whose answers have to come at a least pace."""

    def __init__(self, stream: httpcore2.NetworkStream) -> None:
        self._stream = stream
        self._pace = _Pace()

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._stream.read(max_bytes, timeout)
        self._pace.received(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._pace.sent()
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        spoken = self._stream.start_tls(ssl_context, server_hostname, timeout)
        if isinstance(ssl_context, PinnedContext):
            try:
                ssl_context.check(spoken.get_extra_info("ssl_object").getpeercert(True))
            except OtherKeyError as error:
                spoken.close()
                raise httpcore2.ConnectError(str(error)) from error
        return _PacedStream(spoken)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _PacedBackend(httpcore2.NetworkBackend):
    """Plain sockets of this machine, paced."""

    def __init__(self) -> None:
        self._inner = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        return _PacedStream(self._inner.connect_tcp(host, port, timeout, local_address, socket_options))
