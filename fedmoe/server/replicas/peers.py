"""Requests between replicas: the secret that authenticates them, and how the original caller is passed on."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import Scope

from fedmoe.runtime.errors import ExpectedError
from fedmoe.server.access.security import OF_PEER, STORED_BYTES
from fedmoe.wire.http.bearer import hash_token
from fedmoe.wire.http.middleware import is_loopback

#: Headers that only replicas send: the secret, the caller's address, and how many bytes of a body are stored.
SECRET = "fedmoe-replica-secret"  # noqa: S105  # a header's name
CALLER = "fedmoe-replica-caller"
STORED = "fedmoe-replica-stored"
#: On the answer of a replica that is not the owner: whether anything may have been done.
NOT_OWNER = "fedmoe-replica-not-owner"
NOTHING_DONE, UNKNOWN = "nothing done", "unknown"
_OURS = frozenset(name.encode() for name in (SECRET, CALLER, STORED))
# RFC 9110, 7.6.1: of one connection only. `Expect` is answered by whoever reads the body.
_HOP_BY_HOP = frozenset(
    {
        *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
        *(b"te", b"trailer", b"transfer-encoding", b"upgrade", b"expect"),
    }
)

_SECRET = re.compile(r"[\x21-\x7e]{32,4096}")

RawHeaders = list[tuple[bytes, bytes]]


class PeerSettingError(ExpectedError):
    """A replica cannot talk to others as it was told to; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class PeerSecret:
    """The secret that all replicas of a federation share."""

    secret: str = field(repr=False)

    @classmethod
    def read(cls, file: Path) -> PeerSecret:
        """The one line of a file that nobody else may read; raises `PeerSettingError`."""
        try:
            text, readers = file.read_text("ascii").strip(), file.stat().st_mode & 0o077
        except (OSError, UnicodeDecodeError) as error:
            raise PeerSettingError(f"--replica-secret-file {file} cannot be read: {error}") from None
        if readers:
            raise PeerSettingError(f"--replica-secret-file {file} can be read by others; run 'chmod 600 {file}'")
        if not _SECRET.fullmatch(text):
            raise PeerSettingError(
                f"--replica-secret-file {file} must hold one line of 32 characters or more, printable ASCII without "
                f"spaces, the same for all replicas; 'openssl rand -hex 32 > {file}' makes one"
            )
        return cls(text)

    def admits(self, secret: str) -> bool:
        """Whether a request with this secret is of a replica."""
        return hmac.compare_digest(hash_token(secret), hash_token(self.secret))


def check_address(url: str) -> None:
    """Refuse an address to advertise at which tokens and updates would travel in clear over a network."""
    parts = urlsplit(url)
    if parts.scheme != "https" and not is_loopback(parts.hostname or ""):
        raise PeerSettingError(
            f"--advertise {url}: other replicas send tokens and updates there; off this machine it must be https://"
        )


def end_to_end(headers: Iterable[tuple[bytes, bytes]], without: Iterable[bytes] = ()) -> RawHeaders:
    """The headers that a proxy passes on: without those of one connection, those of replicas, and those given."""
    pairs = [(name.lower(), value) for name, value in headers]
    named = {item.strip().lower() for name, value in pairs if name == b"connection" for item in value.split(b",")}
    dropped = _HOP_BY_HOP | _OURS | named | set(without)
    return [(name, value) for name, value in pairs if name not in dropped]


def claims(secret: PeerSecret, scope: Scope, stored: int | None = None) -> RawHeaders:
    """The headers that say for whom a replica asks; `stored` are the bytes of a body that is in the blob store."""
    client = scope.get("client")
    headers = [(SECRET.encode(), secret.secret.encode()), (CALLER.encode(), str(client[0] if client else "").encode())]
    return headers if stored is None else [*headers, (STORED.encode(), str(stored).encode())]


def is_of_peer(scope: Scope) -> bool:
    """Whether a request says that a replica sent it."""
    return SECRET in Headers(scope=scope)


def caller_of(scope: Scope) -> Scope:
    """The request as its original caller sent it, for a replica that was believed."""
    headers = Headers(scope=scope)
    address, stored = headers.get(CALLER, ""), headers.get(STORED, "")
    state = {**scope.get("state", {}), OF_PEER: True}
    if stored.isdecimal():
        state[STORED_BYTES] = int(stored)
    return {**scope, "client": (address, 0) if address else None, "headers": without_claims(scope), "state": state}


def without_claims(scope: Scope) -> RawHeaders:
    """The headers of a request without those that only replicas send."""
    return [(name, value) for name, value in scope["headers"] if name.lower() not in _OURS]
