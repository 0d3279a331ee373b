"""The start options recorded in a journal of any schema, read without changing it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

#: The key in `meta` of the update rule that every expert's past was made with.
UPDATE_RULE = "update_rule"


@dataclass(frozen=True, slots=True)
class StoredChoices:
    """The update rule, and the number of the last fold into the gateway; None where there is none."""

    update_rule: str | None = None
    last_fold: int | None = None


def read_choices(journal: Path) -> StoredChoices:
    """What a journal's file says of them; nothing where it cannot be read, which whoever opens it will say."""
    try:
        with closing(sqlite3.connect(f"{journal.absolute().as_uri()}?mode=ro", uri=True, timeout=5.0)) as connection:
            rule = connection.execute("SELECT value FROM meta WHERE key = ?", [UPDATE_RULE]).fetchone()
            fold = connection.execute("SELECT max(version) FROM events WHERE kind = 'fold'").fetchone()
    except sqlite3.Error:
        return StoredChoices()
    return StoredChoices(rule[0] if rule else None, fold[0])
