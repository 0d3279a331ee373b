"""Text of others, made harmless to show: nothing in it moves a cursor, sets a colour or turns the reading direction."""

from __future__ import annotations

import unicodedata

#: What a message of somebody else may take of a screen or a log, in characters.
MOST_CHARACTERS = 2000
# Controls, formats (turned reading direction, zero width), halves of surrogate pairs, line and paragraph separators.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def inert(text: str, keep: str = "") -> str:
    """The same text with every unsafe character as a Python escape (`\\x1b`), but for those in `keep`."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(one) if one not in keep and unicodedata.category(one) in _UNSAFE else one for one in text)


def shortened(text: str, most: int = MOST_CHARACTERS) -> str:
    """Inert text that takes no more room than a person reads."""
    return inert(text[:most]) + ("..." if len(text) > most else "")


def inert_json(value: object) -> object:
    """A JSON document with all its texts and keys inert."""
    if isinstance(value, str):
        return inert(value)
    if isinstance(value, list):
        return [inert_json(item) for item in value]
    if isinstance(value, dict):
        return {inert(key): inert_json(item) for key, item in value.items()}
    return value


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
