"""Who may ask: keys by hash where there are any, else only requests addressed to this machine."""

from __future__ import annotations

from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fedmoe.files import write_atomic
from fedmoe.gateway.serve.problems import ApiError
from fedmoe.server.browser import foreign_host, foreign_page
from fedmoe.server.health import is_open
from fedmoe.server.security import hash_token, new_token

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
        raise KeyFileError(f"{file} holds no key hash, so nobody could ask; add one, or remove the file to get a key")
    return frozenset(hashes), None


class DoorMiddleware:
    """Asks for a key on everything but the open paths, before a byte of the body is read.

    `keys` None asks for none, and takes nothing that a page of another site makes a browser send; with `loopback_only`
    requests must then be addressed to this machine as well.
    """

    def __init__(self, app: ASGIApp, keys: frozenset[str] | None, loopback_only: bool) -> None:
        self._app = app
        self._keys = keys
        self._loopback_only = loopback_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            refusal = self._without_keys(headers) if self._keys is None else self._refusal(scope, headers, self._keys)
            if refusal is not None:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _without_keys(self, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if self._loopback_only and (foreign := foreign_host(host)):
            fix = "use http://127.0.0.1, or start the server with --api-keys"
            return ApiError(foreign.status, foreign.code, f"{foreign.detail} {fix}")
        if foreign := foreign_page(host, headers.getlist("sec-fetch-site"), headers.getlist("origin")):
            return ApiError(foreign.status, foreign.code, f"{foreign.detail} Ask from a program, not from a web page.")
        return None

    def _refusal(self, scope: Scope, headers: Headers, keys: frozenset[str]) -> ApiError | None:
        if is_open(scope):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return ApiError(401, "no_api_key", "an API key is needed and none was sent: Authorization: Bearer KEY")
        # The look-up is by hash of 256 random bits: what its timing may tell about a hash leads to no key.
        if hash_token(key.strip()) not in keys:
            return ApiError(401, "invalid_api_key", "this API key is not known here")
        return None
