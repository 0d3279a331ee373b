"""Journals of schema 1 become today's, whatever happens in between (fault 5)."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from pathlib import Path

import forks
import pytest
from state_fixture import unpacked
from typer.testing import CliRunner

from fedmoe.cli.commands import app
from fedmoe.config import CoordinatorConfig
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.verification import check_start, verify_state
from fedmoe.server.storage.backup import make_backup
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.restore import restore
from fedmoe.server.storage.state_dir import StateDir

OPEN = (
    "import sys; from pathlib import Path; from fedmoe.server.storage.state_dir import StateDir\n"
    "StateDir.open(Path(sys.argv[1])).close()"
)
STEPS = ["migrate.copied", "migrate.copy_kept", "migrate.before_commit", "migrate.committed"]


def rows(path: Path, columns: str = "id, kind, expert, version, payload") -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(f"SELECT {columns} FROM events ORDER BY id").fetchall()
    finally:
        connection.close()


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("journal-schema-*.sqlite"))


def test_a_journal_of_schema_1_is_chained_and_a_copy_of_it_stays(tmp_path: Path) -> None:
    state_dir = unpacked(tmp_path, "initial")
    before = rows(state_dir / "journal.sqlite")
    state = StateDir.open(state_dir)
    assert (state.journal.count(), state.journal.meta("schema_version")) == (len(before), "2")
    assert len(state.journal.meta("incarnation") or "") == 32
    state.close()
    assert rows(state_dir / "journal.sqlite") == before
    assert all(chain for (chain,) in rows(state_dir / "journal.sqlite", "chain"))
    (copy,) = copies(state_dir)
    assert (rows(copy), copy.stat().st_mode & 0o077) == (before, 0)
    with pytest.raises(sqlite3.OperationalError, match="no such column: chain"):
        rows(copy, "chain")


@pytest.mark.parametrize("step", STEPS)
def test_killed_at_any_step_the_next_start_finishes_and_the_copy_is_kept_5(tmp_path: Path, step: str) -> None:
    state_dir = unpacked(tmp_path, "initial")
    before = rows(state_dir / "journal.sqlite")
    killed = forks.run("-c", OPEN, str(state_dir), environment=os.environ | {"FEDMOE_FAILPOINTS": f"{step}=1"})
    assert killed.returncode == -signal.SIGKILL
    state = StateDir.open(state_dir)
    assert state.journal.count() == len(before)
    incarnation = state.journal.meta("incarnation")
    state.close()
    assert [rows(copy) for copy in copies(state_dir)] == [before]
    assert not list(state_dir.glob(".*"))
    again = StateDir.open(state_dir)
    assert again.journal.meta("incarnation") == incarnation
    again.close()
    assert len(copies(state_dir)) == 1


def changed(state_dir: Path, statement: str) -> None:
    connection = sqlite3.connect(state_dir / "journal.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()


def number(schema: object) -> str:
    return f"UPDATE meta SET value = '{schema}' WHERE key = 'schema_version'"


def of_schema_2(folder: Path) -> Path:
    state_dir = unpacked(folder, "initial")
    StateDir.open(state_dir).close()
    for copy in copies(state_dir):
        copy.unlink()
    return state_dir


WRONG = {
    "it says schema 1, and its rows are those of schema 2": (of_schema_2, number(1)),
    "it says schema 2, and its rows are those of schema 1": (lambda folder: unpacked(folder, "initial"), number(2)),
    "its schema is '0', which no version of this program writes": (of_schema_2, number(0)),
    "its schema is 'two', which no": (of_schema_2, number("two")),
    "the row of meta that says which schema it has is gone": (
        of_schema_2,
        "DELETE FROM meta WHERE key = 'schema_version'",
    ),
    "it says schema 2, and no rows of events": (of_schema_2, "ALTER TABLE events RENAME TO others"),
}


@pytest.mark.parametrize("told", sorted(WRONG))
def test_a_schema_number_that_was_changed_by_hand_is_named_and_nothing_is_changed(tmp_path: Path, told: str) -> None:
    make, statement = WRONG[told]
    state_dir = make(tmp_path)
    kept = (state_dir / "journal.sqlite").read_bytes()
    changed(state_dir, statement)
    before = (state_dir / "journal.sqlite").read_bytes()
    with pytest.raises(StorageFailedError, match=told) as refused:
        StateDir.open(state_dir)
    assert "state restore" in str(refused.value)
    assert ((state_dir / "journal.sqlite").read_bytes(), copies(state_dir)) == (before, [])
    (finding, *_) = verify_state(state_dir).findings
    assert finding == str(refused.value)
    with pytest.raises(StorageFailedError, match=told):
        make_backup(state_dir, tmp_path / "backup", 0.0)
    (state_dir / "journal.sqlite").write_bytes(kept)  # what was set by hand can be set back
    StateDir.open(state_dir).close()


def test_the_number_of_a_later_schema_is_named_with_the_journal_it_stands_in(tmp_path: Path) -> None:
    state_dir = of_schema_2(tmp_path)
    changed(state_dir, number(3))
    for refuse in (StateDir.open, lambda path: make_backup(path, tmp_path / "backup", 0.0)):
        with pytest.raises(StorageFailedError, match="has schema 3, this program reads 2; run the FedMoE") as refused:
            refuse(state_dir)
        assert f"{state_dir / 'journal.sqlite'} has" in str(refused.value)


@pytest.mark.parametrize("name", ["initial", "gateway"])
def test_a_state_of_schema_1_is_backed_up_as_it_is_before_it_is_brought_to_this_one(tmp_path: Path, name: str) -> None:
    state_dir = unpacked(tmp_path, name)
    before = rows(state_dir / "journal.sqlite")
    made = make_backup(state_dir, tmp_path / "backup", 0.0, check_start)
    assert (made.events, made.schema, made.incarnation) == (len(before), 1, "")
    assert rows(tmp_path / "backup" / "journal.sqlite") == before
    assert {entry.name for entry in (tmp_path / "backup").iterdir()} == {"journal.sqlite", "blobs", "backup.json"}
    for path in (state_dir, tmp_path / "backup"):  # neither was brought to another schema
        with pytest.raises(sqlite3.OperationalError, match="no such column: chain"):
            rows(path / "journal.sqlite", "chain")
    restored = restore(tmp_path / "backup", tmp_path / "again")
    assert (restored.events, restored.before) == (len(before), "")
    found = verify_state(tmp_path / "again")
    assert (found.findings, found.events, found.incarnation) == ([], len(before), restored.incarnation)


def test_a_backup_of_schema_1_without_a_blob_that_a_start_needs_is_none(tmp_path: Path) -> None:
    state_dir = unpacked(tmp_path, "initial")
    for blob in (state_dir / "blobs").glob("?" * 64):
        blob.unlink()
    with pytest.raises(StorageFailedError, match=f"missing from {state_dir / 'blobs'}"):
        make_backup(state_dir, tmp_path / "backup", 0.0, check_start)
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]


def test_people_are_told_of_which_schema_a_backup_is(tmp_path: Path) -> None:
    state_dir = unpacked(tmp_path, "initial")
    answer = CliRunner().invoke(app, ["state", "backup", str(tmp_path / "b"), "--state-dir", str(state_dir)])
    assert answer.exit_code == 0, answer.output
    assert "kept as it is, of schema 1" in answer.output


def test_a_backup_of_a_later_schema_is_refused_before_anything_is_moved(tmp_path: Path) -> None:
    state_dir = of_schema_2(tmp_path)
    make_backup(state_dir, tmp_path / "backup", 0.0)
    note = tmp_path / "backup" / "backup.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | {"schema": 3}))
    before = sorted(state_dir.iterdir())
    with pytest.raises(StorageFailedError, match="has schema 3"):
        restore(tmp_path / "backup", state_dir, replace=True)
    assert sorted(state_dir.iterdir()) == before


REFUSED = [("initial", "rule_mismatch"), ("gateway", "start_mismatch")]


@pytest.mark.parametrize("schema", [1, 2])
@pytest.mark.parametrize(("name", "code"), REFUSED)
def test_a_start_with_options_that_do_not_fit_changes_nothing(
    tmp_path: Path, name: str, code: str, schema: int
) -> None:
    state_dir = unpacked(tmp_path, name)
    if schema == 2:
        StateDir.open(state_dir).close()
    before = contents(state_dir)
    with pytest.raises(RefusedError) as refused:
        DistributedCoordinator(CoordinatorConfig(state_dir=str(state_dir), accept_older_journal=True))
    assert refused.value.code == code
    assert contents(state_dir) == before


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, and the empty ones that SQLite makes to read."""
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name.endswith(("lock", "-wal", "-shm"))]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
