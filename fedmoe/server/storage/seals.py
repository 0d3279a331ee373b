"""A hash of every row of the journal's small tables, so that edits by other programs are found.

Rows of events are chained; other tables change in place, so each of their rows has a seal, a hash of its content, in a
table of its own. Triggers of the journal's own connection keep the seals, whatever writes through it, and exist nowhere
else: a row that was edited, put in or taken out by anything but the journal does not fit its seal.
"""

# ruff: noqa: S608  # the names in statements are those of the journal's own tables
from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedmoe.server.storage.tables import META, SNAPSHOTS

#: Under this key of `meta` stand the tables that have seals, as JSON.
SEALED = "sealed"
#: Tables with seals or a chain of their own.
_UNSEALED = {"events", "seals"}
_CREATE = (
    "CREATE TABLE IF NOT EXISTS seals (place TEXT NOT NULL, row TEXT NOT NULL, seal TEXT NOT NULL, "
    "PRIMARY KEY (place, row)) WITHOUT ROWID"
)


@dataclass(frozen=True, slots=True)
class DamagedRow:
    """A row that does not fit its seal; `row` is its primary key as JSON, `problem` says what is wrong in words."""

    table: str
    row: str
    problem: str

    def __str__(self) -> str:
        return f"row {self.row} of {self.table} {self.problem}"


@dataclass(frozen=True, slots=True)
class _SealedTable:
    """A table with the columns of its primary key and all of its columns."""

    name: str
    key: tuple[str, ...]
    columns: tuple[str, ...]

    def key_of(self, row: str) -> str:
        """SQL for the key of OLD or NEW."""
        return f"fedmoe_key({_listed(row, self.key)})"

    def of(self, row: str) -> str:
        """SQL for the key and the seal of OLD or NEW."""
        return f"{self.key_of(row)}, fedmoe_seal({_listed(row, self.columns)})"


def _listed(row: str, columns: Iterable[str]) -> str:
    return ", ".join(f'{row}."{name}"' for name in columns)


def keep_seals(connection: sqlite3.Connection) -> None:
    """Make the seals of tables that have none yet, and keep all of them from now on; leaves a transaction open."""
    connection.create_function("fedmoe_key", -1, row_key, deterministic=True)
    connection.create_function("fedmoe_seal", -1, row_seal, deterministic=True)
    # REPLACE deletes a row first, and only with this its triggers run.
    connection.execute("PRAGMA recursive_triggers=ON")
    connection.execute(_CREATE)
    sealed = _sealed_names(connection)
    for table in _tables(connection):
        if table.name not in sealed:
            connection.execute("INSERT INTO seals VALUES (?, '', '')", [table.name])
            connection.execute(f"INSERT INTO seals SELECT '{table.name}', {table.of('t')} FROM \"{table.name}\" AS t")
        for statement in _triggers(table):
            connection.execute(statement)


def note_sealed(connection: sqlite3.Connection) -> None:
    """Note in `meta` which tables have seals, once that table is known to be as it was written."""
    names = json.dumps(sorted(_sealed_names(connection)))
    if connection.execute("SELECT value FROM meta WHERE key = ?", [SEALED]).fetchone() != (names,):
        connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [SEALED, names])


def lost_seals(connection: sqlite3.Connection) -> list[str]:
    """Tables that had seals and have none any more, in name order: what they hold cannot be checked."""
    noted = connection.execute("SELECT value FROM meta WHERE key = ?", [SEALED]).fetchone()
    there = connection.execute("SELECT 1 FROM main.sqlite_master WHERE name = 'seals'").fetchone()
    sealed = _sealed_names(connection) if there else set()
    try:
        return sorted(set(json.loads(noted[0])) - sealed) if noted else []
    except (TypeError, ValueError):
        return []  # an edited note does not fit its own seal


def _sealed_names(connection: sqlite3.Connection) -> set[str]:
    return {place for (place,) in connection.execute("SELECT place FROM seals WHERE row = ''")}


def damaged_rows(connection: sqlite3.Connection) -> list[DamagedRow]:
    """Every row that is not as the journal wrote it; of tables that have seals."""
    sealed = _sealed_names(connection)
    tables = [table for table in _tables(connection) if table.name in sealed]
    lost = [DamagedRow(name, "", "is gone with its table") for name in sealed - {table.name for table in tables}]
    return lost + [damage for table in tables for damage in _damaged(connection, table)]


@dataclass(frozen=True, slots=True)
class FatalDamage:
    """Damage that a journal cannot be opened with: its rows in words, and what else can be done about it."""

    rows: str
    hint: str


def fatal_damage(damage: Sequence[DamagedRow], skip_damaged: bool) -> FatalDamage | None:
    """What of the damage cannot be left out; None where all of it can.

    Snapshots only save time and are left out in any case, other rows with `skip_damaged`, what `meta` says never.
    """
    optional = {row.table for row in damage} - {META.name} if skip_damaged else {SNAPSHOTS.name}
    fatal = [row for row in damage if row.table not in optional]
    if not fatal:
        return None
    others = f", and {len(fatal) - 1} more" if len(fatal) > 1 else ""
    hint = " To go on without such rows, start once with --skip-damaged."
    return FatalDamage(f"{fatal[0]}{others}", "" if META.name in {row.table for row in fatal} else hint)


def drop_damaged(connection: sqlite3.Connection, damage: Iterable[DamagedRow]) -> None:
    """Take rows that are not as they were written out of their tables; leaves a transaction open."""
    tables = {table.name: table for table in _tables(connection)}
    for row in damage:
        if row.table in tables:
            key = tables[row.table].key_of("t")
            connection.execute(f'DELETE FROM "{row.table}" AS t WHERE {key} = ?', [row.row])
        connection.execute("DELETE FROM seals WHERE place = ? AND row = ?", [row.table, row.row])


def _damaged(connection: sqlite3.Connection, table: _SealedTable) -> Iterator[DamagedRow]:
    query = "SELECT row, seal FROM seals WHERE place = ? AND row != ''"
    seals = dict(connection.execute(query, [table.name]).fetchall())
    columns = _listed("t", (*table.key, *table.columns))
    for row in connection.execute(f'SELECT {columns} FROM "{table.name}" AS t'):
        key, seal = row_key(*row[: len(table.key)]), row_seal(*row[len(table.key) :])
        expected = seals.pop(key, None)
        if expected is None:
            yield DamagedRow(table.name, key, "was not written by the journal")
        elif expected != seal:
            yield DamagedRow(table.name, key, "is not as it was written")
    yield from (DamagedRow(table.name, key, "is gone") for key in seals)


def _tables(connection: sqlite3.Connection) -> list[_SealedTable]:
    tables = []
    names = connection.execute("SELECT name FROM main.sqlite_master WHERE type = 'table' ORDER BY name").fetchall()
    for (name,) in names:
        if name in _UNSEALED or not name.isidentifier() or name.startswith("sqlite_"):
            continue
        columns = connection.execute(f'PRAGMA main.table_info("{name}")').fetchall()
        key = tuple(column[1] for column in sorted(columns, key=lambda column: column[5]) if column[5])
        tables.append(_SealedTable(name, key, tuple(column[1] for column in columns)))
    return tables


def _triggers(table: _SealedTable) -> Iterator[str]:
    name, forget = table.name, f"DELETE FROM seals WHERE place = '{table.name}' AND row = "
    drop, keep = f"{forget}{table.key_of('OLD')};", f"INSERT INTO seals VALUES ('{name}', {table.of('NEW')});"
    instead = f"{forget}{table.key_of('NEW')};"
    for event, actions in (("INSERT", instead + keep), ("UPDATE", drop + instead + keep), ("DELETE", drop)):
        trigger = f'"seal_{name}_{event.lower()}"'
        yield f'CREATE TEMP TRIGGER IF NOT EXISTS {trigger} AFTER {event} ON main."{name}" BEGIN {actions} END'


def row_key(*values: object) -> str:
    """The primary key of a row, as JSON."""
    return json.dumps(values, default=repr)


def row_seal(*values: object) -> str:
    """The hash of a row's columns in the order of its table."""
    return hashlib.sha256(row_key(*values).encode()).hexdigest()
