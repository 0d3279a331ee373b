"""The identity of a history; a new one begins wherever acknowledged changes may have been lost."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass

#: Keys of the journal's table `meta`: the incarnation it is in, and those before as JSON.
INCARNATION = "incarnation"
INCARNATIONS_BEFORE = "incarnations_before"


@dataclass(frozen=True, slots=True)
class FormerIncarnation:
    """An incarnation that another one followed, and how many events the journal held then."""

    incarnation: str
    events: int


def new_incarnation() -> str:
    """A name that no other history has: 32 hex digits."""
    return secrets.token_hex(16)


def to_text(ended: list[FormerIncarnation]) -> str:
    """As `meta` keeps it."""
    return json.dumps([asdict(one) for one in ended])


def of_text(text: str | None) -> list[FormerIncarnation]:
    """What `to_text` wrote; none for None."""
    return [FormerIncarnation(**one) for one in json.loads(text)] if text else []
