"""Seals of the small tables' rows in PostgreSQL, written with the rows by the one process that writes them.

They are those of `storage.seals`; here no trigger keeps them, but every statement that changes rows returns these.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.seals import DamagedRow, row_key, row_seal
from fedmoe.server.storage.tables import EVENTS, LATER_TABLES, TABLES

_METADATA = sa.MetaData()
SEALS = sa.Table(
    "seals",
    _METADATA,
    sa.Column("place", sa.Text, primary_key=True),
    sa.Column("row", sa.Text, primary_key=True),
    sa.Column("seal", sa.Text, nullable=False),
)
#: Tables whose rows have seals; those of events are chained.
SEALED = tuple(table for metadata in (TABLES, LATER_TABLES) for table in metadata.sorted_tables if table is not EVENTS)


def put_statement(table: sa.Table) -> sa.Insert:
    """Rows for a table, each in the place of the one with its primary key."""
    statement = insert(table)
    changed = {column.name: statement.excluded[column.name] for column in table.columns if not column.primary_key}
    return statement.on_conflict_do_update(index_elements=list(table.primary_key), set_=changed)


def write_sealed(
    connection: sa.Connection, statement: sa.Insert | sa.Delete, rows: list[dict[str, object]] | None = None
) -> Sequence[sa.RowMapping]:
    """Run a statement on a sealed table and write the seals of the rows it left; these rows, or those it removed."""
    table = statement.table
    assert isinstance(table, sa.Table)
    changed = connection.execute(statement.returning(*table.columns), rows).mappings().all()
    keys = [{"place": table.name, "row": _key(table, row)} for row in changed]
    if not keys:
        return changed
    if isinstance(statement, sa.Delete):
        removal = SEALS.delete().where(SEALS.c.place == sa.bindparam("place_"), SEALS.c.row == sa.bindparam("row_"))
        connection.execute(removal, [{f"{name}_": value for name, value in key.items()} for key in keys])
    else:
        seals = [key | {"seal": row_seal(*row.values())} for key, row in zip(keys, changed, strict=True)]
        connection.execute(put_statement(SEALS), seals)
    return changed


def reseal(connection: sa.Connection, before: sa.Table, after: sa.Table) -> None:
    """Seal the rows of a table whose columns a revision has changed, if they were as they had been written.

    Called in that revision, with the table's definitions before and after it. Raises StorageFailedError.
    """
    damage = list(_damaged(connection, before))
    if damage:
        raise StorageFailedError(f"the schema was not changed: {damage[0]}. Restore the database from a backup.")
    rows = connection.execute(sa.select(*after.columns)).mappings().all()
    seals = [{"place": after.name, "row": _key(after, row), "seal": row_seal(*row.values())} for row in rows]
    if seals:
        connection.execute(put_statement(SEALS), seals)


def damaged_rows(connection: sa.Connection) -> list[DamagedRow]:
    """Every row of the small tables that is not as the journal wrote it."""
    return [damage for table in SEALED for damage in _damaged(connection, table)]


def drop_damaged(connection: sa.Connection, damage: Iterable[DamagedRow]) -> None:
    """Take rows that are not as they were written out of their tables."""
    tables = {table.name: table for table in SEALED}
    for row in damage:
        key = zip(tables[row.table].primary_key, json.loads(row.row), strict=True)
        connection.execute(tables[row.table].delete().where(*(column == value for column, value in key)))
        connection.execute(SEALS.delete().where(SEALS.c.place == row.table, SEALS.c.row == row.row))


def _damaged(connection: sa.Connection, table: sa.Table) -> Iterator[DamagedRow]:
    sealed = connection.execute(sa.select(SEALS.c.row, SEALS.c.seal).where(SEALS.c.place == table.name))
    seals = {row.row: row.seal for row in sealed}
    for row in connection.execute(sa.select(*table.columns)).mappings():
        key = _key(table, row)
        expected = seals.pop(key, None)
        if expected is None:
            yield DamagedRow(table.name, key, "was not written by the journal")
        elif expected != row_seal(*row.values()):
            yield DamagedRow(table.name, key, "is not as it was written")
    yield from (DamagedRow(table.name, key, "is gone") for key in seals)


def _key(table: sa.Table, row: sa.RowMapping) -> str:
    return row_key(*(row[column.name] for column in table.primary_key))
