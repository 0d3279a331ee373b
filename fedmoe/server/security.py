"""Who may do what: tokens by hash, roles, and the scope of a worker's token."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedmoe.errors import RefusedError
from fedmoe.storage.journal import Journal, TokenRecord

ROLES = ("worker", "join", "admin")


@dataclass(frozen=True, slots=True)
class Principal:
    """Who a request comes from; `worker` and `experts` None mean any."""

    role: str
    worker: str | None = None
    experts: tuple[str, ...] | None = None

    def require_admin(self) -> None:
        if self.role != "admin":
            raise _forbidden(f"this needs an admin token, got one with role {self.role!r}.")

    def require_worker(self, worker: str) -> None:
        if self.worker is not None and worker != self.worker:
            raise _forbidden(f"this token belongs to worker {self.worker!r}, the request names {worker!r}.")

    def may_use(self, expert: str) -> bool:
        """Whether the expert is within this token's scope."""
        return self.experts is None or expert in self.experts

    def require_expert(self, expert: str) -> None:
        if not self.may_use(expert):
            scope = ", ".join(self.experts or ())
            raise _forbidden(f"this token may use {scope}; the request names {expert!r}.")


#: Everybody, where no token is asked for (loopback, or --insecure).
ANYBODY = Principal("admin")


def hash_token(token: str) -> str:
    """What is kept of a token; tokens are 256 random bits, so a plain hash cannot be searched."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_token(prefix: str = "fmt") -> str:
    """A fresh token: 256 random bits with a prefix that secret scanners can recognise."""
    return f"{prefix}_{secrets.token_urlsafe(32)}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class TokenGate:
    """Knows the tokens; read from the journal at start, changed through `add` and `revoke`."""

    def __init__(self, journal: Journal, required: bool, clock: Callable[[], float]) -> None:
        self._journal = journal
        self.required = required
        self._clock = clock
        self._records = {record.hash: record for record in journal.tokens()}

    def has(self, role: str) -> bool:
        """Whether a usable token of this role exists."""
        return any(record.role == role and self._usable(record) for record in self._records.values())

    def add(
        self,
        token: str,
        role: str,
        worker: str | None = None,
        experts: Sequence[str] | None = None,
        expires_at: float | None = None,
    ) -> TokenRecord:
        """Keep a token's hash with what it may do; a revoked token stays revoked whoever brings it back."""
        scope = tuple(experts) if experts is not None else None
        record = TokenRecord(hash_token(token), role, worker, scope, expires_at)
        known = self._records.get(record.hash)
        if known is not None and known.revoked:
            raise RefusedError(
                "token_revoked", f"the given {role} token was revoked.", "Take another one, or none to get a new one."
            )
        self._journal.put_token(record)
        self._records[record.hash] = record
        return record

    def revoke(self, token_hash: str) -> None:
        """Refuse a token from now on."""
        record = self._records.get(token_hash)
        if record is None:
            raise RefusedError("unknown_token", "no token has this hash.", "Hashes are shown when a token is made.")
        revoked = TokenRecord(record.hash, record.role, record.worker, record.experts, record.expires_at, True)
        self._journal.put_token(revoked)
        self._records[token_hash] = revoked

    def admit(self, authorization: str | None) -> Principal:
        """Who sent this `Authorization` header; raises unless a usable token is shown where one is required."""
        if not self.required:
            return ANYBODY
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise _unauthorised("a token is needed and none was sent.")
        presented = hash_token(token.strip())
        # The look-up is by hash of 256 random bits: what its timing may tell about a hash leads to no token.
        found = self._records.get(presented)
        if found is None or not hmac.compare_digest(found.hash, presented):
            raise _unauthorised("this token is not known here.")
        if not self._usable(found):
            raise _unauthorised("this token was revoked." if found.revoked else "this token has expired.")
        return Principal(found.role, found.worker, found.experts)

    def _usable(self, record: TokenRecord) -> bool:
        return not record.revoked and (record.expires_at is None or record.expires_at > self._clock())


def _unauthorised(detail: str) -> RefusedError:
    return RefusedError("unauthorised", detail, "Send 'Authorization: Bearer TOKEN' (--token or FEDMOE_TOKEN).")


def _forbidden(detail: str) -> RefusedError:
    return RefusedError("forbidden", detail, "Ask the coordinator's operator for a token with this scope.")
