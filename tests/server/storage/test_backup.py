"""Backup and restore of a state directory: whole, verified, or not there at all."""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import forks
import pytest
from support import accepted, registered, sha256

from fedmoe.runtime import failpoints
from fedmoe.server.storage.audit import AUDIT_HEAD, AuditHead, check_file
from fedmoe.server.storage.backup import BLOBS, JOURNAL, NOTE, make_backup, read_backup
from fedmoe.server.storage.blobs import StorageFailedError, put
from fedmoe.server.storage.restore import restore
from fedmoe.server.storage.state_dir import StateDir, StateDirError

PLACES = ["backup.blobs_placed", "backup.journal_copied", "backup.before_note"]
BODIES = [f"update {number}".encode() * 100 for number in range(1, 6)]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


def event_of(number: int) -> object:
    return accepted(number, digest=sha256(BODIES[number - 1]))


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    """A state in use, with three updates."""
    opened = StateDir.open(tmp_path / "state")
    opened.journal.append([registered()])
    for number in (1, 2, 3):
        put(opened.blobs, BODIES[number - 1])
        opened.journal.append([event_of(number)])  # type: ignore[list-item]
    return opened


def contents(folder: Path) -> tuple[int, set[bytes], str | None]:
    """Events, blobs and incarnation of a state that starts."""
    opened = StateDir.open(folder)
    try:
        blobs = {opened.blobs.read(digest) for digest in opened.blobs.digests()}
        return opened.journal.count(), blobs, opened.journal.meta("incarnation")
    finally:
        opened.close()


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_backup_of_a_state_in_use_restores_to_the_same_under_another_name(state: StateDir, tmp_path: Path) -> None:
    made = make_backup(state.path, tmp_path / "backup", 5.0)
    name = state.journal.meta("incarnation")
    assert (made.events, made.blobs, made.at, made.incarnation) == (4, 3, 5.0, name)
    assert read_backup(tmp_path / "backup") == made
    put(state.blobs, BODIES[3])
    state.journal.append([event_of(4)])  # type: ignore[list-item]
    restored = restore(tmp_path / "backup", tmp_path / "again")
    assert contents(tmp_path / "again") == (4, set(BODIES[:3]), restored.incarnation)
    assert restored.incarnation != restored.before == name
    # The backup and the state it was made of stay as they were.
    assert state.journal.count() == 5
    assert restore(tmp_path / "backup", tmp_path / "third").incarnation != restored.incarnation


def test_no_backup_is_made_of_a_journal_that_lacks_what_was_acknowledged(state: StateDir, tmp_path: Path) -> None:
    shutil.copytree(state.path, tmp_path / "older")
    put(state.blobs, BODIES[3])
    state.journal.append([event_of(4)])  # type: ignore[list-item]
    state.close()
    for file in state.path.glob("journal.sqlite*"):
        file.unlink()
    for file in (tmp_path / "older").glob("journal.sqlite*"):
        shutil.copy(file, state.path / file.name)
    with pytest.raises(StorageFailedError, match=r"not the newest.*--accept-older-journal"):
        make_backup(state.path, tmp_path / "backup", 5.0)
    assert not (tmp_path / "backup").exists()


def test_a_restored_state_begins_an_audit_log_of_its_own(state: StateDir, tmp_path: Path) -> None:
    state.journal.set_meta(AUDIT_HEAD, str(AuditHead(7, "f" * 64)))
    make_backup(state.path, tmp_path / "backup", 5.0)
    restore(tmp_path / "backup", tmp_path / "again")
    again = StateDir.open(tmp_path / "again")
    known = AuditHead.of_text(again.journal.meta(AUDIT_HEAD))
    again.close()
    assert check_file(tmp_path / "again", known).breaks == ()


def test_the_journal_of_a_backup_is_one_file_that_holds_what_only_the_log_had(state: StateDir, tmp_path: Path) -> None:
    assert (state.path / "journal.sqlite-wal").stat().st_size > 0
    make_backup(state.path, tmp_path / "backup", 0.0)
    assert {entry.name for entry in (tmp_path / "backup").iterdir()} == {JOURNAL, BLOBS, NOTE}


def test_a_backup_of_a_stopped_or_killed_coordinator_is_made_the_same_way(state: StateDir, tmp_path: Path) -> None:
    shutil.copytree(state.path, tmp_path / "killed")  # as a kill leaves it: the log beside the journal
    state.close()
    for folder in (state.path, tmp_path / "killed"):
        assert make_backup(folder, tmp_path / f"backup of {folder.name}", 0.0).events == 4


def test_nobody_else_can_read_it(state: StateDir, tmp_path: Path) -> None:
    make_backup(state.path, tmp_path / "backup", 0.0)
    restore(tmp_path / "backup", tmp_path / "again")
    for folder in (tmp_path / "backup", tmp_path / "again"):
        assert {path.stat().st_mode & 0o077 for path in (folder, *folder.rglob("*"))} == {0}


@pytest.mark.parametrize("copied", [False, True])
def test_blobs_are_linked_where_they_can_be_and_copied_where_not(
    copied: bool, state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError("no links on this disk")

    if copied:
        monkeypatch.setattr(os, "link", no_links)
    made = make_backup(state.path, tmp_path / "backup", 0.0)
    assert made.linked == (0 if copied else 3)
    shutil.rmtree(state.path / "blobs")
    restore(tmp_path / "backup", tmp_path / "again")
    assert contents(tmp_path / "again")[1] == set(BODIES[:3])


def test_what_is_let_go_of_while_it_is_copied_does_not_make_a_backup_with_holes(
    state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the blobs and the journal an update lands and goes again, as with --keep-updates."""
    passes: list[str] = []

    def reached(place: str) -> None:
        if place == "backup.blobs_placed" and not passes:
            passes.append(place)
            state.journal.append([event_of(4)])  # type: ignore[list-item]

    monkeypatch.setattr(failpoints, "reached", reached)
    made = make_backup(state.path, tmp_path / "backup", 0.0)
    assert passes
    # Named by the copy, and gone already when it was made again: known as let go of.
    assert (made.events, made.blobs, made.absent) == (5, 3, 1)


def test_a_blob_that_goes_after_it_was_placed_stays_in_the_backup(
    state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(place: str) -> None:
        if place == "backup.blobs_placed":
            state.blobs.delete(sha256(BODIES[0]))

    monkeypatch.setattr(failpoints, "reached", reached)
    assert make_backup(state.path, tmp_path / "backup", 0.0).blobs == 3


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_backup_leaves_nothing_that_could_be_taken_for_one(
    place: str, state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reached(name: str) -> None:
        if name == place:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "reached", reached)
        with pytest.raises(KeyboardInterrupt):
            make_backup(state.path, tmp_path / "backup", 0.0)
    assert {entry.name for entry in tmp_path.iterdir()} == {"state"}


@pytest.mark.parametrize("place", [*PLACES, "backup.before_name"])
def test_a_killed_backup_is_not_taken_for_one_and_the_next_one_takes_its_place(
    place: str, state: StateDir, tmp_path: Path
) -> None:
    """Fault 73."""
    target = tmp_path / "backup"
    code = (
        "import sys; from pathlib import Path; from fedmoe.server.storage.backup import make_backup\n"
        "make_backup(Path(sys.argv[1]), Path(sys.argv[2]), 0.0)"
    )
    environment = os.environ | {"FEDMOE_FAILPOINTS": f"{place}=1"}
    killed = forks.run("-c", code, str(state.path), str(target), environment=environment)
    assert killed.returncode == -9
    left = target.with_name(".backup.unfinished")
    assert (left.exists(), target.exists()) == (True, False)
    if place != "backup.before_name":
        with pytest.raises(StateDirError, match="is no backup"):
            restore(left, tmp_path / "again")
    assert make_backup(state.path, target, 0.0).blobs == 3
    assert not left.exists()


def test_places_where_no_backup_can_be_made_are_refused(state: StateDir, tmp_path: Path) -> None:
    make_backup(state.path, tmp_path / "backup", 0.0)
    before = files(tmp_path)
    with pytest.raises(StateDirError, match="exists; a backup is a new folder"):
        make_backup(state.path, tmp_path / "backup", 0.0)
    with pytest.raises(StateDirError, match="in the state directory itself"):
        make_backup(state.path, state.path / "backup", 0.0)
    with pytest.raises(StateDirError, match=r"there is no journal\.sqlite in it"):
        make_backup(tmp_path, tmp_path / "other", 0.0)
    assert files(tmp_path) == before


def test_damaged_blobs_are_left_out_and_counted_and_what_no_start_can_do_without_is_no_backup(
    state: StateDir, tmp_path: Path
) -> None:
    digest = sha256(BODIES[1])
    (state.path / "blobs" / digest).write_bytes(b"other")

    def needs_it(folder: Path) -> None:
        if not (folder / BLOBS / digest).exists():
            raise StorageFailedError("it is needed")

    with pytest.raises(StorageFailedError, match="it is needed"):
        make_backup(state.path, tmp_path / "backup", 0.0, needs_it)
    assert {entry.name for entry in tmp_path.iterdir()} == {"state"}
    made = make_backup(state.path, tmp_path / "backup", 0.0)
    assert (made.blobs, made.damaged) == (2, 1)
    restore(tmp_path / "backup", tmp_path / "again")
    assert contents(tmp_path / "again")[1] == {BODIES[0], BODIES[2]}


def damage_a_blob(backup: Path) -> None:
    path = backup / BLOBS / sha256(BODIES[0])
    body = bytearray(path.read_bytes())
    path.unlink()
    body[7] ^= 1
    path.write_bytes(body)


def lose_a_blob(backup: Path) -> None:
    (backup / BLOBS / sha256(BODIES[0])).unlink()


def change_the_journal(backup: Path) -> None:
    with closing(sqlite3.connect(backup / JOURNAL)) as connection:
        connection.execute("UPDATE events SET payload = replace(payload, '1.0', '9.0')")
        connection.commit()


def lose_the_note(backup: Path) -> None:
    (backup / NOTE).unlink()


@pytest.mark.parametrize("damage", [damage_a_blob, lose_a_blob, change_the_journal, lose_the_note])
def test_a_backup_that_is_not_as_it_was_made_is_not_restored(
    damage: Callable[[Path], None], state: StateDir, tmp_path: Path
) -> None:
    """Fault 73."""
    make_backup(state.path, tmp_path / "backup", 0.0)
    damage(tmp_path / "backup")
    with pytest.raises((StorageFailedError, StateDirError)):
        restore(tmp_path / "backup", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_with_something_in_it_is_only_restored_into_when_told_so(state: StateDir, tmp_path: Path) -> None:
    make_backup(state.path, tmp_path / "backup", 0.0)
    put(state.blobs, BODIES[3])
    state.journal.append([event_of(4)])  # type: ignore[list-item]
    for replace in (False, True):
        with pytest.raises(StateDirError, match=f"process id {os.getpid()}; stop it first"):
            restore(tmp_path / "backup", state.path, replace)
    state.close()
    before = files(state.path)
    with pytest.raises(StateDirError, match=r"is not empty; .* --replace"):
        restore(tmp_path / "backup", state.path)
    assert files(state.path) == before
    (state.path / "tls").mkdir()
    (state.path / "tls" / "key.pem").write_text("pinned by workers")
    restored = restore(tmp_path / "backup", state.path, replace=True)
    assert (state.path / "tls" / "key.pem").read_text() == "pinned by workers"
    assert contents(state.path)[:2] == (4, set(BODIES[:3]))
    assert restored.moved is not None
    assert contents(restored.moved)[:2] == (5, set(BODIES[:4]))
    assert restore(tmp_path / "backup", state.path, replace=True).moved != restored.moved


@pytest.mark.parametrize("place", ["restore.blobs_placed", "restore.before_journal"])
def test_a_killed_restore_starts_nothing_and_the_same_command_ends_it(
    place: str, state: StateDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 73."""
    make_backup(state.path, tmp_path / "backup", 0.0)

    def reached(name: str) -> None:
        if name == place:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(failpoints, "reached", reached)
        with pytest.raises(Killed):
            restore(tmp_path / "backup", tmp_path / "again")
    assert not (tmp_path / "again" / JOURNAL).exists()
    with pytest.raises(StorageFailedError, match=r"is not the newest: it (is empty|holds 0 events)"):
        StateDir.open(tmp_path / "again")
    restore(tmp_path / "backup", tmp_path / "again")
    assert contents(tmp_path / "again")[:2] == (4, set(BODIES[:3]))
    assert {entry.name for entry in (tmp_path / "again").iterdir()} >= {JOURNAL, BLOBS}
