"""Why a coordinator was not reached, in words: network, certificate, or protocol."""

from __future__ import annotations

import contextlib
import errno
import socket
import ssl
from typing import TypeVar
from urllib.parse import urlsplit

import httpx2

from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.safe_text import shortened
from fedmoe.wire.answers import CoordinatorUnavailableError
from fedmoe.wire.pin import OtherKeyError
from fedmoe.wire.transport import ProxyChoice

ErrorT = TypeVar("ErrorT", bound=BaseException)
_PROBE_SECONDS = 2.0
_PROBE_READS = 64
# What OpenSSL says of bytes that are no TLS.
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "PACKET_LENGTH_TOO_LONG", "RECORD_LAYER_FAILURE")
_TRUST = (
    "set SSL_CERT_FILE to a PEM file with the certificate of its authority, or of the coordinator itself, or write the "
    "fingerprint of its key, which its operator knows, behind the URL: https://HOST:PORT#FINGERPRINT"
)
_OTHER_NAME = "use a name or address that is in it, or make one that has this one"
#: X509_V_ERR_* of OpenSSL (https://docs.openssl.org/3.0/man3/X509_STORE_CTX_get_error/) -> what is wrong, what to do.
_CERTIFICATE = {
    9: ("is not valid yet", "set this machine's clock, or make a new certificate"),
    10: ("expired", "make a new one for the coordinator and restart it, or set this machine's clock"),
    18: ("not trusted: it is self-signed", _TRUST),
    19: ("not trusted: its authority is not known here", _TRUST),
    62: ("is for another host", _OTHER_NAME),
    64: ("is for another address", _OTHER_NAME),
}
#: Less is reported to nobody: the answer was on its way, and clocks differ.
_REPORTED_FROM = 60.0


def unreachable(
    url: str, error: httpx2.HTTPError, proxy: ProxyChoice | None, sent: int, answered: bool = False
) -> Exception:
    """The error for a failure of the transport: says whose fault it probably is and what to do.

    `answered` says that this port has answered before, so that it surely speaks what is asked in.
    A CoordinatorUnavailableError, or a RefusedError where only another setting helps: a proxy's password.
    """
    if isinstance(error, httpx2.ProxyError) and proxy is not None:
        return _refused_by(proxy, shortened(str(error), 120))
    problem = _certificate(url, error) or (None if answered else _wrong_protocol(url, error, proxy))
    if problem is not None:
        return CoordinatorUnavailableError(f"{url}: {problem}", advised=True)
    reason = _reason(error)
    if sent and isinstance(error, httpx2.ReadError | httpx2.WriteError | httpx2.RemoteProtocolError):
        reason += f" (a body of {sent:,} bytes was sent; a proxy's size limit can end like this)"
    through = f" through the proxy {proxy.shown}" if proxy is not None else ""
    return CoordinatorUnavailableError(f"{url} does not answer{through}: {reason}")


def _refused_by(proxy: ProxyChoice, answer: str) -> Exception:
    prefix = f"the proxy {proxy.shown} answered {answer}"
    if answer.startswith("407"):
        return RefusedError(
            "proxy_authentication",
            f"{prefix}: it wants a user and a password.",
            f"Write them into {proxy.variable} as http://USER:PASSWORD@HOST:PORT.",
        )
    advice = "let its operator allow the coordinator's host and port, or put the host into NO_PROXY"
    return CoordinatorUnavailableError(f"{prefix}, so the coordinator was not reached; {advice}", advised=True)


def _cause(error: BaseException, kind: type[ErrorT]) -> ErrorT | None:
    """The error, or the nearest that it came from, of this kind."""
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None or isinstance(cause, kind):
            return cause
        cause = cause.__cause__ or cause.__context__
    return None


def _certificate(url: str, error: httpx2.HTTPError) -> str | None:
    if (other := _cause(error, OtherKeyError)) is not None:
        return str(other)
    failure = _cause(error, ssl.SSLCertVerificationError)
    if failure is None:
        return None
    what, advice = _CERTIFICATE.get(failure.verify_code, ("not trusted", _TRUST))
    detail = shortened(failure.verify_message or str(failure), 200)
    return f"certificate {what} ({detail}): {advice}. `fedmoe doctor --coordinator-url {url}` shows the certificate"


def _wrong_protocol(url: str, error: httpx2.HTTPError, proxy: ProxyChoice | None) -> str | None:
    parts = urlsplit(url)
    failure = _cause(error, ssl.SSLError)
    if parts.scheme == "https" and failure is not None and any(word in str(failure) for word in _NOT_TLS):
        return "this port speaks http, not https: write http:// in the URL, or start the coordinator with --tls-cert"
    if parts.scheme != "http" or proxy is not None:
        return None
    ended = isinstance(error, httpx2.RemoteProtocolError | httpx2.ReadError)
    if ended and speaks_tls(parts.hostname or "", parts.port or 80):
        return "this port speaks https: write https:// in the URL"
    return None


def speaks_tls(host: str, port: int) -> bool:
    """Whether somebody shakes hands in TLS there, whatever the certificate; nothing is sent.

    The handshake goes through memory: Python 3.11's `SSLSocket` is left unclosed where the peer resets the connection
    before it begins.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    with (
        contextlib.suppress(OSError, ValueError),
        socket.create_connection((host, port), _PROBE_SECONDS) as peer,
    ):
        handshake = context.wrap_bio(incoming, outgoing, server_hostname=host)
        for _ in range(_PROBE_READS):
            try:
                handshake.do_handshake()
            except ssl.SSLWantReadError:
                peer.sendall(outgoing.read())
                answer = peer.recv(1 << 16)
                if not answer:
                    return False
                incoming.write(answer)
            else:
                return True
    return False


def _reason(error: httpx2.HTTPError) -> str:
    cause = _cause(error, OSError)
    if isinstance(error, httpx2.ConnectTimeout):
        return "no connection in time; a firewall may drop it, or the address is wrong"
    if isinstance(error, httpx2.TimeoutException):
        return shortened(str(error), 200) or "no answer in time"
    if isinstance(cause, socket.gaierror):
        return f"its name is not known ({cause.strerror})"
    if cause is not None and cause.errno == errno.ECONNREFUSED:
        return "nothing listens on that port (connection refused)"
    return shortened(str(error) or type(error).__name__, 300)


def clock_difference(coordinator_time: object, now: float) -> str:
    """A sentence on this machine's clock, `now`, beside the time in a coordinator's answer; empty if they agree.

    Both are seconds since 1970; what is no number says nothing.
    """
    if isinstance(coordinator_time, bool) or not isinstance(coordinator_time, (int, float)):
        return ""
    ahead = now - coordinator_time
    if not _REPORTED_FROM <= abs(ahead) < float("inf"):
        return ""
    minutes = round(abs(ahead) / 60)
    far = f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    return f"This machine's clock is {far} {'ahead of' if ahead > 0 else 'behind'} the coordinator's."
