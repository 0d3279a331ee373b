"""URLs in configurations: of servers, coordinators with a fingerprint, buckets, databases; what is wrong, in words."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from pydantic import SecretStr


def usable_url(value: str) -> str:
    """The URL without a slash at its end; nothing in it may be a secret or confuse a terminal."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in value or "?" in value or "#" in value or not value.isprintable() or " " in value:
        # What may hold a password or a token is not repeated.
        got = "one with more than host, port and path in it" if set("@?#") & set(value) else repr(value)
        raise ValueError(f"expected a URL like http://192.168.1.100:5000, got {got}")
    return value.rstrip("/")


def usable_coordinator(value: str) -> str:
    """A URL that may have the fingerprint of a key behind it."""
    url, mark, fingerprint = value.partition("#")
    if mark and not (re.fullmatch("[0-9a-f]{64}", fingerprint.lower()) and url.lower().startswith("https://")):
        raise ValueError("expected https://HOST:PORT#FINGERPRINT, a fingerprint of 64 digits 0-9 and a-f")
    return usable_url(url) + mark + fingerprint.lower()


def usable_blobs(value: str) -> str:
    """The URL of a bucket without a slash at its end; raises ValueError, with credentials in it too."""
    try:
        parts = urlsplit(value)
        usable = parts.scheme in ("s3", "gs", "az") and bool(parts.netloc) and parts.netloc == parts.hostname
    except ValueError:
        usable = False
    if not usable or "?" in value or "#" in value or not value.isprintable() or " " in value:
        # What was given is not repeated: somebody may have put a secret into it.
        raise ValueError("expected s3://bucket/prefix, gs://bucket/prefix or az://container/prefix, no credentials")
    return value.rstrip("/")


def usable_database(value: SecretStr) -> SecretStr:
    """Never shows the value, in which there may be a password."""
    url = value.get_secret_value()
    if not re.match(r"postgresql(\+psycopg)?://", url) or not url.isprintable() or " " in url:
        raise ValueError("expected postgresql+psycopg://user@host/database; a password belongs into PGPASSFILE")
    return value
