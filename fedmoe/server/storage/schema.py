"""The schema of a journal: the number it records, checked against the columns it has."""

from __future__ import annotations

import sqlite3

from fedmoe.server.storage.sqlite import changed_outside, other_schema
from fedmoe.server.storage.tables import EVENTS, META, SCHEMA_VERSION

_SINCE_2 = {"version_digest", "chain"}
_FIRST = 1
_MOST_DIGITS = 9


def schema_of(connection: sqlite3.Connection, where: str) -> int | None:
    """The schema of a journal, this one or an earlier; None where nothing was journalled yet.

    Raises StorageFailedError for a later one, and for a number that is not the one it was written with.
    """
    tables = {name for (name,) in connection.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'")}
    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall()) if META.name in tables else {}
    if not meta:
        return None
    recorded = meta.get("schema_version")
    if recorded is None:
        raise changed_outside(where, "the row of meta that says which schema it has is gone")
    number = _number(recorded)
    if number is None or number < _FIRST:
        raise changed_outside(where, f"its schema is {recorded!r}, which no version of this program writes")
    if number > SCHEMA_VERSION:
        raise other_schema(where, str(number))
    columns = {row[1] for row in connection.execute(f'PRAGMA main.table_info("{EVENTS.name}")')}
    says = "no rows of events" if not columns else f"its rows are those of schema {2 if columns >= _SINCE_2 else 1}"
    if not columns or (number >= 2) != (columns >= _SINCE_2):
        raise changed_outside(where, f"it says schema {number}, and {says}; a number set by hand can be set back")
    return number


def _number(recorded: object) -> int | None:
    text = str(recorded)
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS else None
