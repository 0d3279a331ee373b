"""Bearer tokens and API keys: made, read from a header, hashed."""

from __future__ import annotations

import hashlib
import secrets


def bearer_of(authorization: str | None) -> str | None:
    """The token that an `Authorization` header shows, None without one of the kind Bearer."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def hash_token(token: str) -> str:
    """What is kept of a token; tokens are 256 random bits, so a plain hash cannot be searched."""
    return hashlib.sha256(token.encode()).hexdigest()


def new_token(prefix: str = "fmt") -> str:
    """A fresh token: 256 random bits with a prefix that secret scanners can recognise."""
    return f"{prefix}_{secrets.token_urlsafe(32)}"
