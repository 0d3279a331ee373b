"""The journal's schema in PostgreSQL: revisions run under a lock, so that of several processes one does it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

import sqlalchemy as sa
import structlog

from fedmoe.server.storage.acknowledged import Head
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.chained_journal import HEAD, SCHEMA
from fedmoe.server.storage.postgres import DatabaseUrlError, changed_outside, unhurried
from fedmoe.server.storage.postgres_seals import put_statement, write_sealed
from fedmoe.server.storage.sqlite import other_schema
from fedmoe.server.storage.tables import EVENTS, INCARNATION, LATER_TABLES, META, MOVED_FROM, SCHEMA_VERSION, TABLES

#: Where Alembic finds the revisions.
REVISIONS = (Path(__file__).parent / "revisions",)
_LOCK = sa.text("SELECT pg_advisory_xact_lock(hashtext('fedmoe.schema'), hashtext(current_schema()))")
_log = structlog.get_logger("fedmoe.journal")


def prepare_schema(
    connection: sa.Connection,
    where: str,
    fence: Callable[[sa.Connection], None],
    revisions: Iterable[Path],
    moved_from: str | None = None,
) -> None:
    """Bring the tables to the newest revision, and begin an empty journal where there is none; all of it or nothing.

    With `moved_from` an empty one is marked as what is being moved here. Raises StorageFailedError for one with another
    mark, and for a revision that a later version of this program made.
    """
    with connection.begin():
        fence(connection)
        unhurried(connection).execute(_LOCK)
        _upgrade(connection, where, revisions)
        _check_tables(connection, where)
        meta = dict(connection.execute(sa.select(META.c.key, META.c.value)).all())
        if not meta:
            _begin(connection, where, moved_from)
        elif meta.get(SCHEMA) != str(SCHEMA_VERSION):
            raise other_schema(where, str(meta.get(SCHEMA)))
        elif meta.get(MOVED_FROM) not in (None, moved_from):
            raise StorageFailedError(
                f"{where} holds half of the federation of {meta[MOVED_FROM]}: 'fedmoe state migrate' was ended before "
                "all of it was moved. Give that command again; the source is as it was."
            )


def _upgrade(connection: sa.Connection, where: str, revisions: Iterable[Path]) -> None:
    try:
        from alembic.config import Config
        from alembic.runtime.environment import EnvironmentContext
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory
    except ModuleNotFoundError as error:
        raise DatabaseUrlError(f"PostgreSQL needs the package {error.name}: pip install 'fedmoe[postgres]'") from error
    script = ScriptDirectory(str(REVISIONS[0].parent), version_locations=[str(folder) for folder in revisions])
    before, newest = MigrationContext.configure(connection).get_current_revision(), script.get_current_head()
    if before == newest:
        return
    known = [revision.revision for revision in script.walk_revisions()]
    if before is not None and before not in known:
        raise StorageFailedError(
            f"the journal {where} has the schema's revision {before!r}, this program knows {', '.join(known)}; run the "
            "FedMoE version that wrote it, or a newer one."
        )

    def steps(current: object, context: object) -> object:
        return script._upgrade_revs("head", current)  # as its documentation does

    with EnvironmentContext(Config(), script, fn=steps) as environment:
        environment.configure(connection=connection)
        environment.run_migrations()
    if before is not None:
        _log.warning("migrated", journal=where, schema=newest, before=before)


def _check_tables(connection: sa.Connection, where: str) -> None:
    """Refuse a journal that lacks a table: what was in it is gone."""
    there = set(sa.inspect(connection).get_table_names())
    missing = sorted({*TABLES.tables, *LATER_TABLES.tables} - there)
    if missing:
        raise changed_outside(where, f"the table {missing[0]} is gone")


def _begin(connection: sa.Connection, where: str, moved_from: str | None) -> None:
    if connection.execute(sa.select(EVENTS.c.id).limit(1)).first() is not None:
        raise changed_outside(where, "the row of meta that says which schema it has is gone")
    name = secrets.token_hex(16)
    made = {SCHEMA: str(SCHEMA_VERSION), INCARNATION: name, HEAD: Head(incarnation=name).to_text()}
    made |= {MOVED_FROM: moved_from} if moved_from is not None else {}
    rows: list[dict[str, object]] = [{"key": key, "value": value} for key, value in made.items()]
    write_sealed(connection, put_statement(META), rows)
