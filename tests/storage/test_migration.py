"""Journals of schema 1 become today's, whatever happens in between (fault 5)."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from state_fixture import unpacked

from fedmoe.storage.state_dir import StateDir

OPEN = (
    "import sys; from pathlib import Path; from fedmoe.storage.state_dir import StateDir\n"
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
    killed = subprocess.run(
        [sys.executable, "-c", OPEN, str(state_dir)],
        env=os.environ | {"FEDMOE_FAILPOINTS": f"{step}=1"},
        timeout=60,
        check=False,
        stderr=subprocess.DEVNULL,
    )
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
