"""Type-checked values of a row: strings, lists and learn/mask flags; invalid values raise `RowError`."""

from __future__ import annotations

from collections.abc import Mapping

from fedmoe.datasets.readers.text_rows import decode_json


class RowError(ValueError):
    """A row whose content does not fit its format."""


class RowLeftOutError(Exception):
    """A row that is sound but that its own marks keep out of the training; the message says which."""


def string(fields: Mapping[str, object], key: str, *, may_be_empty: bool = False) -> str:
    """The string under `key`; an absent or null one counts as empty."""
    value = fields.get(key)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{key!r} must be a string, got {'nothing' if value is None else type(value).__name__}")
    if not may_be_empty and not value.strip():
        raise RowError(f"{key!r} is empty")
    return checked_text(key, value)


def checked_text(key: str, value: str) -> str:
    """`value`, which UTF-8 must be able to hold."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"{key!r} holds half of a surrogate pair (an escape such as \\ud83d alone)") from None
    return value


def items(fields: Mapping[str, object], key: str, *, may_be_empty: bool = False) -> list[object]:
    """The list under `key`; a string (a CSV cell, or how some data sets keep tools) must be the JSON of one."""
    value = fields.get(key)
    if isinstance(value, str):
        if may_be_empty and not value.strip():
            return []
        try:
            value = decode_json(value)
        except ValueError as error:
            raise RowError(f"{key!r} must be a list or the JSON of one: {error}") from None
    if value is None and may_be_empty:
        return []
    if not isinstance(value, list):
        raise RowError(f"{key!r} must be a list, got {type(value).__name__}")
    if not value and not may_be_empty:
        raise RowError(f"{key!r} is empty")
    return value


def mark(key: str, value: object) -> bool:
    """A mark that says whether to learn: true or false, or the numbers 1 and 0 (OpenAI's and Mistral's `weight`)."""
    if isinstance(value, str) and value.strip().casefold() in _WORDS:
        return _WORDS[value.strip().casefold()]
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise RowError(f"{key!r} must be 0, 1, true or false, got {str(value)[:40]!r}; other weights are not supported")


_WORDS = {"0": False, "false": False, "1": True, "true": True}


def some_keys(fields: Mapping[str, object]) -> list[str]:
    """The first few keys, for messages."""
    return [str(key)[:40] for key in list(fields)[:8]]
