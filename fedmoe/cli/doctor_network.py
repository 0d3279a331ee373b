"""Network checks of `fedmoe doctor`, of a running coordinator: proxy, certificate, port, clock; the model hub."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit
from urllib.request import getproxies

import httpx2
import psutil

from fedmoe.cli.options import client
from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.fingerprint import key_fingerprint
from fedmoe.runtime.safe_text import inert
from fedmoe.wire.client import ConnectionSettingError, CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.transport import names_this_machine, proxy_for, transport_for, trusted_certificates

_SECONDS = 5.0
# Tokens that expire, and logs of two machines laid beside each other, go wrong from here on.
_CLOCK_SECONDS = 60.0
_EXPIRES_SOON = 14 * 86400.0
_HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that `fedmoe doctor` looked at: `state` is ok, note or problem; `fix` says what to do."""

    what: str
    state: str
    found: str
    fix: str = ""

    @classmethod
    def judged(cls, what: str, result: str, good: bool, fix: str, state: str = "note") -> Finding:
        """All is well, or `state` and what to do."""
        return cls(what, "ok", result) if good else cls(what, state, result, fix)


def coordinator_findings(url: str, token: str | None) -> Iterator[Finding]:
    """The way to a coordinator, from the proxy to the answer; what stands in the way of the rest ends it."""
    try:
        api = client(url, token)
        url = api.url
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        proxy = proxy_for(url, getproxies())
    except ConnectionSettingError as error:
        yield Finding("connection", "problem", str(error))
        return
    with api:
        yield Finding("connection", "ok", f"through the proxy {proxy.shown}" if proxy else "direct, no proxy")
        if parts.scheme == "https" and proxy is None:
            yield _pinned(host, port, api.fingerprint) if api.fingerprint else _certificate(host, port)
        elif token and not names_this_machine(host):
            fix = "start the coordinator with --tls auto, or with --tls-cert and --tls-key, and use https://"
            yield Finding("TLS", "note", "none: the token and all weights travel in clear", fix)
        yield from _answers(api, url, host, port)


def _answers(api: CoordinatorClient, url: str, host: str, port: int) -> Iterator[Finding]:
    try:
        theirs, now = api.date(), time.time()
    except (CoordinatorUnavailableError, RefusedError) as error:
        yield from _no_answer(error, url, host, port)
        return
    if theirs is not None:
        yield _clock(now - theirs)
    try:
        listing = api.list_experts()
    except RefusedError as error:
        yield Finding("coordinator", "problem", f"{url} refuses: {error.detail}", error.fix)
    except CoordinatorUnavailableError as error:
        yield Finding("coordinator", "problem", str(error), "" if error.advised else "see the coordinator's log")
    else:
        yield Finding("coordinator", "ok", f"{url}, {len(listing.experts)} experts")


def _no_answer(error: Exception, url: str, host: str, port: int) -> Iterator[Finding]:
    advised = isinstance(error, RefusedError) or (isinstance(error, CoordinatorUnavailableError) and error.advised)
    if not names_this_machine(host):
        fix = "" if advised else "check the URL, that the coordinator runs there with --host, and firewalls"
        yield Finding("coordinator", "problem", str(error), fix)
        return
    if (holder := port_holder(host, port)) is None:
        yield Finding("port", "ok", f"{port} is free here")
        start = "fedmoe coordinator" + ("" if port == 5000 else f" --port {port}")
        yield Finding("coordinator", "note", f"{url} does not answer", f"start it with: {start}")
        return
    fix = "" if advised else "give the coordinator another --port, and the workers its URL"
    yield Finding("port", "note", f"{port} is held by {holder}")
    yield Finding("coordinator", "problem", str(error), fix)


def port_holder(host: str, port: int) -> str | None:
    """Who listens on a port of this machine, as far as that can be told; None if it is free."""
    try:
        with socket.create_server((host if host not in ("", "localhost") else "127.0.0.1", port)):
            return None
    except OSError:
        pass
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    except (psutil.Error, OSError, AttributeError):
        pass
    return "another process"


def _clock(ahead: float) -> Finding:
    shown = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    fix = "let both machines set their clocks by the network (timedatectl set-ntp true); tokens expire by them"
    return Finding.judged("clock", shown, abs(ahead) < _CLOCK_SECONDS, fix, "problem")


def _certificate(host: str, port: int) -> Finding:
    """The certificate of a server, checked as a worker would, with its fingerprint in any case."""
    try:
        shown = f"SHA-256 {fingerprint(host, port)}"
    except (OSError, ValueError) as error:
        return Finding("TLS", "problem", f"no handshake: {inert(str(error))}", "see the line `coordinator`")
    try:
        with (
            socket.create_connection((host, port), _SECONDS) as plain,
            trusted_certificates().wrap_socket(plain, server_hostname=host) as spoken,
        ):
            end = ssl.cert_time_to_seconds(str((spoken.getpeercert() or {})["notAfter"]))
    except ssl.SSLCertVerificationError as error:
        fix = (
            "see the line `coordinator`; if the fingerprint is the one that `openssl x509 -noout -fingerprint -sha256 "
            "-in CERTIFICATE` shows there, set SSL_CERT_FILE to a copy of that file; or use the URL with "
            "#FINGERPRINT that the coordinator shows at its start"
        )
        return Finding("TLS", "problem", f"not trusted ({inert(error.verify_message)}), {shown}", fix)
    except (OSError, KeyError, ValueError) as error:
        return Finding("TLS", "problem", f"{inert(str(error))}, {shown}", "see the line `coordinator`")
    seconds = end - time.time()
    fix = "make a new certificate, and restart the coordinator with it"
    return Finding.judged("TLS", f"{shown}, valid for {seconds / 86400:.0f} days", seconds >= _EXPIRES_SOON, fix)


def _pinned(host: str, port: int, expected: str) -> Finding:
    """Whether a server has the key that the URL pins."""
    try:
        found = key_fingerprint(_der(host, port))
    except (OSError, ValueError) as error:
        return Finding("TLS", "problem", f"no handshake: {inert(str(error))}", "see the line `coordinator`")
    if found == expected:
        return Finding("TLS", "ok", f"the key is the pinned one, {found}")
    fix = "see the line `coordinator`; if the coordinator was set up anew, use the URL that it shows now"
    return Finding("TLS", "problem", f"the key is {found}, pinned is {expected}", fix)


def _der(host: str, port: int) -> bytes:
    return ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, port), timeout=_SECONDS))


def fingerprint(host: str, port: int) -> str:
    """The SHA-256 of a server's certificate as openssl writes it; nothing is checked. Raises OSError or ValueError."""
    digest = hashlib.sha256(_der(host, port)).hexdigest().upper()
    return ":".join(digest[place : place + 2] for place in range(0, len(digest), 2))


def hub_finding() -> Finding:
    """Whether models and data sets can be fetched."""
    offline = next((name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)), None)
    if offline:
        fix = f"unset {offline} to fetch; or name folders: --base-model FOLDER, --dataset FILE"
        return Finding("hub", "note", f"{offline} is set: only what was fetched before is used", fix)
    endpoint = os.environ.get("HF_ENDPOINT", _HUB).rstrip("/")
    folders = "name folders instead: --base-model FOLDER, --dataset FILE; or copy ~/.cache/huggingface here"
    try:
        proxy = proxy_for(endpoint, getproxies())
        # The status alone: how long an answer goes on is up to whoever sends it.
        with (
            httpx2.Client(transport=transport_for(endpoint, proxy), timeout=_SECONDS) as http,
            http.stream("GET", f"{endpoint}/api/models", params={"limit": 1}) as answer,
        ):
            status = answer.status_code
    except ConnectionSettingError as error:
        return Finding("hub", "problem", str(error))
    except httpx2.HTTPError as error:
        reason = inert(str(error) or type(error).__name__)
        return Finding("hub", "problem", f"{endpoint} does not answer ({reason})", folders)
    if status in (401, 403):
        return Finding("hub", "problem", f"{endpoint} answered {status}", "set HF_TOKEN, or let the proxy pass it")
    shown = endpoint if status == 200 else f"{endpoint} answered {status}"
    return Finding.judged("hub", shown, status == 200, f"set HF_ENDPOINT to a hub, or {folders}", "problem")
