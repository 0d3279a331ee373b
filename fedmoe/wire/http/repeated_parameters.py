"""Refuses requests that give a parameter or single-valued header twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from urllib.parse import parse_qsl

from starlette.types import Scope

from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.http.middleware import RefusalMiddleware

#: Headers that decide something here and have one value; those that are lists may come in several lines.
_ONE_VALUE = frozenset({"authorization", "content-length", "content-type", "fedmoe-protocol", "host", "user-agent"})


def repeated(query: bytes, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """What a request says more than once, in words; None where everything is clear."""
    names = Counter(name.lower().decode("latin-1") for name, _ in headers)
    twice = sorted(name for name in _ONE_VALUE if names[name] > 1)
    if twice:
        return f"the header {twice[0]}"
    if b"&" not in query:
        return None
    keys = Counter(key for key, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    key = next((key for key, count in keys.items() if count > 1), None)
    return None if key is None else f"the parameter {key[:80]!r}"


class RepeatedMiddleware(RefusalMiddleware):
    """Refuses requests that say something twice."""

    def refusal(self, scope: Scope) -> RefusedError | None:
        what = repeated(scope["query_string"], scope["headers"])
        if what is None:
            return None
        return RefusedError("malformed", f"{what} was given more than once; it has one value.", "Send it once.")
