"""HTTP transport to a coordinator: proxy, certificates, and a minimum download pace.

A server that lets an answer trickle would hold a thread for ever: every byte ends the wait that a timeout bounds. So
what comes in after the first byte of an answer has to come at `LEAST_BYTES_PER_SECOND`, measured over `PACE_SECONDS`.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpcore2
import httpx2

from fedmoe.runtime.logs import warn
from fedmoe.wire.proxy import ConnectionSettingError, ProxyChoice, proxy_for

LEAST_BYTES_PER_SECOND = 1 << 10
PACE_SECONDS = 20.0


def check_url(url: str) -> None:
    """Raise `ConnectionSettingError` unless the URL names a host, by http or https."""
    try:
        read = httpx2.URL(url)
        reason = "" if read.scheme in ("http", "https") and read.host else "it names no host"
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


def transport_for(url: str, proxy: ProxyChoice | None) -> httpx2.HTTPTransport:
    """Connections to `url`; raises `ConnectionSettingError` for a proxy or certificates that cannot be used."""
    encrypted = urlsplit(url).scheme == "https"
    try:
        proxied = None
        if proxy is not None:
            tls = urlsplit(proxy.url).scheme == "https"
            proxied = httpx2.Proxy(proxy.url, ssl_context=trusted_certificates() if tls else None)
    except (httpx2.InvalidURL, ValueError) as error:
        raise ConnectionSettingError(f"the proxy {proxy and proxy.variable} cannot be used: {error}") from error
    # Plain http needs no certificates, and must not fail over a variable that names them wrongly.
    context = trusted_certificates() if encrypted else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
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

    def __init__(self, clock: Callable[[], float]) -> None:
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

    def __init__(self, stream: httpcore2.NetworkStream, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._pace = _Pace(clock)

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
        return _PacedStream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._clock)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _PacedBackend(httpcore2.NetworkBackend):
    """Plain sockets of this machine, paced."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._inner = httpcore2.SyncBackend()
        self._clock = clock

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        stream = self._inner.connect_tcp(host, port, timeout, local_address, socket_options)
        return _PacedStream(stream, self._clock)
