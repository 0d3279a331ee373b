"""The journal's tables in PostgreSQL: made under a lock, so that of several processes one does it."""

from __future__ import annotations

import secrets

import sqlalchemy as sa

from fedmoe.server.storage.acknowledged import Head
from fedmoe.server.storage.chained_journal import HEAD
from fedmoe.server.storage.postgres import changed_outside
from fedmoe.server.storage.postgres_seals import SEALS, put_statement, write_sealed
from fedmoe.server.storage.sqlite import other_schema
from fedmoe.server.storage.tables import EVENTS, INCARNATION, LATER_TABLES, META, SCHEMA_VERSION, TABLES

_SCHEMA = "schema_version"


def make_tables(connection: sa.Connection, where: str) -> None:
    """Make what is missing, and an empty journal where there is none; raises StorageFailedError for another schema."""
    with connection.begin():
        connection.execute(
            sa.text("SELECT pg_advisory_xact_lock(hashtext('fedmoe.schema'), hashtext(current_schema()))")
        )
        for metadata in (TABLES, LATER_TABLES, SEALS.metadata):
            metadata.create_all(connection)
        meta = dict(connection.execute(sa.select(META.c.key, META.c.value)).all())
        if not meta:
            if connection.execute(sa.select(EVENTS.c.id).limit(1)).first() is not None:
                raise changed_outside(where, "the row of meta that says which schema it has is gone")
            name = secrets.token_hex(16)
            made = {_SCHEMA: str(SCHEMA_VERSION), INCARNATION: name, HEAD: Head(incarnation=name).to_text()}
            rows: list[dict[str, object]] = [{"key": key, "value": value} for key, value in made.items()]
            write_sealed(connection, put_statement(META), rows)
        elif meta.get(_SCHEMA) != str(SCHEMA_VERSION):
            raise other_schema(where, str(meta.get(_SCHEMA)))
