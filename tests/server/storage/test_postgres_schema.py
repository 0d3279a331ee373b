"""Revisions of the schema in PostgreSQL: the first one, a second one made for the test, and processes at once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from postgres_server import PostgresServer
from support import accepted, registered

from fedmoe.server.storage import postgres_seals
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.journal import NotOwnerError
from fedmoe.server.storage.postgres import postgres_engine
from fedmoe.server.storage.postgres_journal import PostgresJournal
from fedmoe.server.storage.postgres_schema import REVISIONS
from fedmoe.server.storage.postgres_seals import SEALS, damaged_rows, reseal
from fedmoe.server.storage.tables import LATER_TABLES, SNAPSHOTS, TABLES

pytestmark = pytest.mark.scale

SECOND = """
import sqlalchemy as sa
from alembic import op

revision = "second"
down_revision = "first"


def upgrade():
    op.add_column("events", sa.Column("note", sa.Text))
    op.create_table("labels", sa.Column("name", sa.Text, primary_key=True))
"""


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.schema()


@pytest.fixture
def engine(url: str) -> Iterator[sa.Engine]:
    made = postgres_engine(url)
    yield made
    made.dispose()


@pytest.fixture
def newer(tmp_path: Path) -> tuple[Path, ...]:
    """The revisions of a later version."""
    (tmp_path / "second.py").write_text(SECOND)
    return (*REVISIONS, tmp_path)


def test_the_revisions_make_the_tables_that_the_program_knows(url: str, engine: sa.Engine) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    PostgresJournal(url).close()
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        differences = compare_metadata(context, [TABLES, LATER_TABLES, SEALS.metadata])
    assert differences == []


def test_a_later_revision_upgrades_and_the_earlier_program_refuses_what_it_does_not_know(
    url: str, engine: sa.Engine, newer: tuple[Path, ...]
) -> None:
    with closing(PostgresJournal(url)) as journal:
        journal.append([registered(), accepted(1)])
    for version in (2, 3):
        with closing(PostgresJournal(url, revisions=newer)) as journal:
            journal.append([accepted(version)])
    with pytest.raises(StorageFailedError, match="revision 'second', this program knows first; run"):
        PostgresJournal(url)
    assert sa.inspect(engine).has_table("labels")
    with closing(PostgresJournal(url, revisions=newer)) as journal:
        assert journal.count() == 4


def test_a_revision_that_fails_half_way_changes_nothing(url: str, engine: sa.Engine, newer: tuple[Path, ...]) -> None:
    with closing(PostgresJournal(url)) as journal:
        journal.append([registered()])
    (newer[-1] / "second.py").write_text(SECOND + "    raise RuntimeError('half way')\n")
    with pytest.raises(RuntimeError, match="half way"):
        PostgresJournal(url, revisions=newer)
    assert not sa.inspect(engine).has_table("labels")
    with closing(PostgresJournal(url)) as journal:
        assert journal.count() == 1


def test_of_many_processes_that_open_an_empty_database_one_begins_the_journal(url: str, engine: sa.Engine) -> None:
    """Each takes the journal over from the one before, as replicas do."""
    with ThreadPoolExecutor(4) as threads:
        journals = list(threads.map(lambda _: PostgresJournal(url, fence=lambda connection: None), range(4)))
    assert len({journal.meta("incarnation") for journal in journals}) == 1
    for journal in journals:
        journal.close()


def test_rows_are_checked_as_of_one_moment_whatever_another_writer_does(
    url: str, engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    PostgresJournal(url).close()
    check = postgres_seals.damaged_rows
    others: list[PostgresJournal] = []

    def checked_late(connection: sa.Connection) -> object:
        """Another process becomes the writer between the first read of this transaction and the check."""
        connection.execute(sa.text("SELECT count(*) FROM meta"))
        if not others:
            monkeypatch.setattr(postgres_seals, "damaged_rows", check)
            others.append(PostgresJournal(url, fence=lambda connection: None))
        row = connection.execute(sa.text("SELECT value FROM meta WHERE key = 'writer'")).scalar_one()
        assert row != others[0]._writer, "what it did is not seen yet"
        return check(connection)

    monkeypatch.setattr(postgres_seals, "damaged_rows", checked_late)
    journal = PostgresJournal(url, fence=lambda connection: None)
    with pytest.raises(NotOwnerError):
        journal.append([registered()])
    for opened in (journal, *others):
        opened.close()


def test_whoever_does_not_own_the_federation_makes_no_table(url: str, engine: sa.Engine) -> None:
    def refuse(connection: sa.Connection) -> None:
        raise NotOwnerError("told to")

    with pytest.raises(NotOwnerError):
        PostgresJournal(url, fence=refuse)
    assert sa.inspect(engine).get_table_names() == []


def test_a_revision_that_changes_columns_seals_their_rows_anew_but_none_that_was_edited(
    url: str, engine: sa.Engine
) -> None:
    with closing(PostgresJournal(url)) as journal:
        journal.add_snapshot("python", 1, "a" * 64)
    after = SNAPSHOTS.to_metadata(sa.MetaData())
    after.append_column(sa.Column("size", sa.BigInteger))
    with engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE snapshots ADD COLUMN size BIGINT"))
        reseal(connection, SNAPSHOTS, after)
        assert [row.problem for row in damaged_rows(connection)] == ["is not as it was written"], "sealed for `after`"
        reseal(connection, after, SNAPSHOTS)
        assert damaged_rows(connection) == []
        connection.execute(sa.text("UPDATE snapshots SET digest = 'b'"))
        with pytest.raises(StorageFailedError, match=r"the schema was not changed: row .* of snapshots"):
            reseal(connection, SNAPSHOTS, after)
