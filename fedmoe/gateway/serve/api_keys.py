"""API keys: the file of their hashes, and the middleware that requires one."""

from __future__ import annotations

from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Scope

from fedmoe.gateway.serve.problems import refusal
from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.files import write_atomic
from fedmoe.wire.http.bearer import bearer_of, hash_token, new_token
from fedmoe.wire.http.middleware import RefusalMiddleware, is_open

_HEXADECIMAL = frozenset("0123456789abcdef")


class KeyFileError(ValueError):
    """A file of key hashes that cannot be used."""


def read_keys(file: Path) -> tuple[frozenset[str], str | None]:
    """The hashes (sha256) in `file`, one a line, and the key in clear if the file was missing and one was made.

    Lines that begin with # are for people, as is what follows a hash on its line.
    """
    if not file.exists():
        key = new_token("fmk")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, f"{hash_token(key)} made at the first start\n".encode(), 0o600)
        return frozenset({hash_token(key)}), key
    hashes = set()
    for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words[0]) != 64 or not _HEXADECIMAL.issuperset(words[0]):
            raise KeyFileError(
                f"{file}, line {number}: expected the sha256 of a key as 64 hexadecimal digits; "
                "make one with: printf %s KEY | sha256sum"
            )
        hashes.add(words[0])
    if not hashes:
        raise KeyFileError(f"{file} holds no key hash, so no client could ask; add one, or remove it to get a key")
    return frozenset(hashes), None


class ApiKeyMiddleware(RefusalMiddleware):
    """Requires one of `keys` (hashes) on all but the open paths, before a byte of the body is read."""

    def __init__(self, app: ASGIApp, keys: frozenset[str]) -> None:
        super().__init__(app, refusal)
        self._keys = keys

    def refusal(self, scope: Scope) -> RefusedError | None:
        if is_open(scope):
            return None
        key = bearer_of(Headers(scope=scope).get("authorization"))
        if key is None:
            return RefusedError("no_api_key", "an API key is needed and none was sent: Authorization: Bearer KEY")
        # The look-up is by hash of 256 random bits: what its timing may tell about a hash leads to no key.
        if hash_token(key) not in self._keys:
            return RefusedError("invalid_api_key", "this API key is not known here")
        return None
