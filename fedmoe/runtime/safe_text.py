"""Escaping of untrusted text for terminals and logs: no cursor moves, colours or changes of reading direction."""

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
    unsafe = {character for character in {*text} - {*keep} if unicodedata.category(character) in _UNSAFE}
    escapes = {ord(letter): letter.encode("unicode_escape", "surrogatepass").decode("ascii") for letter in unsafe}
    return text.translate(escapes)


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
