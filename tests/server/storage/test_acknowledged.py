"""What is known of a journal outside of it: an older one in its place is refused, and nothing of the newer one goes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import forks
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import accepted, registered

from fedmoe.server.history.verification import verify_state
from fedmoe.server.storage.acknowledged import AcknowledgedFile, Head, journal_gap
from fedmoe.server.storage.backup import make_backup
from fedmoe.server.storage.blobs import StorageFailedError, put
from fedmoe.server.storage.records import TokenRecord
from fedmoe.server.storage.state_dir import StateDir, StateDirError

HEAD = Head(7, "a" * 64, 12, "b" * 32)


def grown(path: Path, updates: range, sequence: int = 0) -> StateDir:
    """The state directory, left open, with these updates journalled and their blobs stored."""
    state = StateDir.open(path)
    if state.journal.count() == 0:
        state.journal.append([registered()])
    for version in updates:
        digest = put(state.blobs, f"{sequence} {version}".encode())
        state.journal.append([accepted(version, sequence=sequence + version, digest=digest)])
    return state


def content(path: Path) -> dict[str, bytes]:
    files = [file for file in path.rglob("*") if file.is_file() and file.name not in ("lock", "acknowledged")]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


# The file.


def test_a_head_comes_back(tmp_path: Path) -> None:
    file = AcknowledgedFile(tmp_path / "acknowledged")
    assert file.read() is None
    for changes in range(5):
        file.write(replace(HEAD, changes=changes))
        assert file.read() == replace(HEAD, changes=changes)
    file.start_anew(replace(HEAD, changes=1))
    assert file.read() == replace(HEAD, changes=1)
    file.close()
    again = AcknowledgedFile(tmp_path / "acknowledged")
    assert again.read() == replace(HEAD, changes=1)
    again.close()


@given(place=st.integers(0, 1), start=st.integers(0, 511), length=st.integers(1, 512), byte=st.integers(0, 255))
def test_a_torn_place_leaves_the_one_before(
    tmp_path_factory: pytest.TempPathFactory, place: int, start: int, length: int, byte: int
) -> None:
    path = tmp_path_factory.mktemp("torn") / "acknowledged"
    file = AcknowledgedFile(path)
    heads = [replace(HEAD, changes=8), replace(HEAD, changes=9)]
    for head in heads:
        file.write(head)
    stop = min(512, start + length)
    os.pwrite(file._descriptor, bytes([byte]) * (stop - start), place * 512 + start)
    assert file.read() in (
        heads[1 - place],
        heads[1],
    )  # blanks at the end of a place may be anything that reads as none
    file.close()


def lacking(head: Head, chain_there: str | None) -> str:
    gap = journal_gap(HEAD, head, chain_there)
    assert gap is not None
    return gap.reason


def test_what_was_noted_is_held_against_the_journal() -> None:
    assert journal_gap(HEAD, HEAD, HEAD.chain) is None
    assert journal_gap(HEAD, replace(HEAD, events=8, changes=13, chain="c" * 64), HEAD.chain) is None
    assert lacking(replace(HEAD, events=6), None) == "it holds 6 events and 7 were acknowledged"
    assert "another history" in lacking(replace(HEAD, events=9), "c" * 64)
    assert lacking(replace(HEAD, changes=11), HEAD.chain) == "it holds 11 changes and 12 were acknowledged"


# The start.


def older(path: Path) -> None:
    monday, friday = path / "journal.sqlite", path.parent / "friday.sqlite"
    grown(path, range(1, 4)).close()
    shutil.copy(monday, path.parent / "monday.sqlite")
    grown(path, range(4, 8)).close()
    shutil.move(monday, friday)
    shutil.copy(path.parent / "monday.sqlite", monday)


def without_its_log(path: Path) -> None:
    """The write-ahead log is in a file of its own until the journal is closed."""
    grown(path, range(1, 4)).close()
    state = grown(path, range(4, 8))
    shutil.copytree(path, path.parent / "copy")
    state.close()
    shutil.rmtree(path)
    shutil.move(path.parent / "copy", path)
    (path / "journal.sqlite-wal").unlink()
    (path / "journal.sqlite-shm").unlink()


def gone(path: Path) -> None:
    grown(path, range(1, 8)).close()
    (path / "journal.sqlite").unlink()


def of_another_history(path: Path) -> None:
    grown(path, range(1, 4)).close()
    shutil.copytree(path, path.parent / "other")
    grown(path.parent / "other", range(4, 12), sequence=100).close()
    grown(path, range(4, 8)).close()
    shutil.copy(path.parent / "other" / "journal.sqlite", path / "journal.sqlite")


def before_a_token_was_revoked(path: Path) -> None:
    state = grown(path, range(1, 8))
    state.journal.put_token(TokenRecord("f" * 64, "admin"))
    state.close()
    shutil.copy(path / "journal.sqlite", path.parent / "before.sqlite")
    state = StateDir.open(path)
    state.journal.put_token(TokenRecord("f" * 64, "admin", revoked=True))
    state.close()
    shutil.copy(path.parent / "before.sqlite", path / "journal.sqlite")


@pytest.mark.parametrize("lose", [older, without_its_log, gone, of_another_history, before_a_token_was_revoked])
def test_a_journal_that_lacks_what_was_acknowledged_is_refused_and_nothing_is_deleted(
    tmp_path: Path, lose: Callable[[Path], None]
) -> None:
    """Fault 73."""
    path = tmp_path / "state"
    lose(path)
    blobs = {name: data for name, data in content(path).items() if name.startswith("blobs")}
    for _ in range(2):
        with pytest.raises(StorageFailedError, match=r"not the newest: .*state restore.*--accept-older-journal"):
            StateDir.open(path)
    assert {name: data for name, data in content(path).items() if name.startswith("blobs")} == blobs
    state = StateDir.open(path, accept_older_journal=True)
    incarnation, count = state.journal.meta("incarnation"), state.journal.count()
    ended = json.loads(state.journal.meta("incarnations_before") or "")
    assert [one["events"] for one in ended] == [count]
    assert ended[0]["incarnation"] != incarnation
    state.close()
    again = StateDir.open(path)
    assert (again.journal.meta("incarnation"), again.journal.count()) == (incarnation, count)
    again.close()


def test_the_right_journal_put_back_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "state"
    older(path)
    with pytest.raises(StorageFailedError):
        StateDir.open(path)
    shutil.copy(tmp_path / "friday.sqlite", path / "journal.sqlite")
    state = StateDir.open(path)
    assert state.journal.count() == 8
    state.close()


@pytest.mark.parametrize("since", [range(4, 4), range(4, 6), range(4, 12)])
def test_a_journal_that_was_left_behind_is_told_from_the_one_that_went_on(tmp_path: Path, since: range) -> None:
    """Accepted once without its end, the state went on; then somebody finds the journal that was missing."""
    path = tmp_path / "state"
    older(path)
    accepted_one = StateDir.open(path, accept_older_journal=True)
    begun = accepted_one.journal.head.incarnation
    accepted_one.close()
    state = grown(path, since, sequence=100)
    state.journal.put_token(TokenRecord("f" * 64, "admin", revoked=True))
    events = state.journal.count()
    state.close()
    shutil.move(path / "journal.sqlite", tmp_path / "went-on.sqlite")
    shutil.copy(tmp_path / "friday.sqlite", path / "journal.sqlite")
    with pytest.raises(StorageFailedError, match=rf"the one in use last was {begun}, with {events} events") as refused:
        StateDir.open(path)
    assert "Put the right one back" not in str(refused.value)
    assert "Put that one back, or 'fedmoe state restore BACKUP" in str(refused.value)
    with pytest.raises(StorageFailedError, match=rf"the one in use last was {begun}"):
        make_backup(path, tmp_path / "backup", 0.0)
    shutil.copy(tmp_path / "went-on.sqlite", path / "journal.sqlite")
    state = StateDir.open(path)
    assert (state.journal.head.incarnation, state.journal.count()) == (begun, events)
    state.close()
    shutil.copy(tmp_path / "friday.sqlite", path / "journal.sqlite")
    state = StateDir.open(path, accept_older_journal=True)
    assert state.journal.count() == 8
    state.close()
    StateDir.open(path).close()


def in_its_place(file: Path, kind: str) -> None:
    if file.exists():
        file.rename(file.with_name("moved"))
    if kind == "symbolic link":
        file.symlink_to(file.with_name("moved"))
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("acknowledged", kind) for kind in ("symbolic link", "folder", "pipe")),
        *(("audit.jsonl", kind) for kind in ("folder", "pipe")),
    ],
)
def test_what_is_no_file_in_the_place_of_one_is_named_and_moved_away_the_start_goes_on(
    tmp_path: Path, name: str, kind: str
) -> None:
    path = tmp_path / "state"
    grown(path, range(1, 4)).close()
    in_its_place(path / name, kind)
    shown = {"pipe": "no regular file"}.get(kind, f"a {kind}")
    with pytest.raises(StateDirError, match=rf"{name}, which holds .* is {shown}; move it away"):
        StateDir.open(path)
    findings = verify_state(path).findings
    assert any(f"{path / name}, which holds" in finding for finding in findings), findings
    (path / name).rename(tmp_path / "away")
    StateDir.open(path).close()
    assert not [finding for finding in verify_state(path).findings if "which holds" in finding]


def test_an_audit_log_that_lies_elsewhere_is_in_order(tmp_path: Path) -> None:
    path = tmp_path / "state"
    grown(path, range(1, 4)).close()
    (tmp_path / "log").touch()
    (path / "audit.jsonl").symlink_to(tmp_path / "log")
    StateDir.open(path).close()


def test_a_journal_that_is_ahead_is_what_a_crash_before_the_count_leaves(tmp_path: Path) -> None:
    path = tmp_path / "state"
    grown(path, range(1, 4)).close()
    noted = (path / "acknowledged").read_bytes()
    grown(path, range(4, 8)).close()
    (path / "acknowledged").write_bytes(noted)
    state = StateDir.open(path)
    assert state.journal.count() == 8
    assert state.acknowledged.read() == state.journal.head
    state.close()


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"\xff" * 1024)])
def test_a_count_that_cannot_be_read_is_said_and_made_anew(
    tmp_path: Path, damage: Callable[[Path], object], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "state"
    grown(path, range(1, 4)).close()
    damage(path / "acknowledged")
    state = StateDir.open(path)
    assert "acknowledged_unknown" in "".join(capsys.readouterr())
    assert state.acknowledged.read() == state.journal.head
    state.close()
    StateDir.open(path).close()
    assert "acknowledged_unknown" not in "".join(capsys.readouterr())


def test_the_option_to_accept_changes_nothing_where_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "state"
    grown(path, range(1, 4)).close()
    state = StateDir.open(path, accept_older_journal=True)
    assert state.journal.meta("incarnations_before") is None
    state.close()


def test_a_cut_tail_is_found_even_where_the_count_is_gone_too(tmp_path: Path) -> None:
    path = tmp_path / "state"
    grown(path, range(1, 8)).close()
    (path / "acknowledged").unlink()
    connection = sqlite3.connect(path / "journal.sqlite")
    connection.execute("DELETE FROM events WHERE id > 6")
    connection.commit()
    connection.close()
    with pytest.raises(StorageFailedError, match="the journal ends after 6 events, written were 8"):
        StateDir.open(path)


# Crashes.

APPEND = """
import sys
from pathlib import Path
from support import accepted, registered
from fedmoe.server.storage.state_dir import StateDir, StateDirError
state = StateDir.open(Path(sys.argv[1]))
for version in range(1, 9):
    state.journal.append([accepted(version)] if version > 1 else [registered(), accepted(1)])
    print(version, flush=True)
"""


@pytest.mark.parametrize("place", ["journal.committed", "journal.counted"])
@pytest.mark.parametrize("hit", [1, 2, 5])
def test_killed_around_the_count_the_next_start_has_what_was_told(tmp_path: Path, place: str, hit: int) -> None:
    environment = os.environ | {"FEDMOE_FAILPOINTS": f"{place}={hit}"}
    killed = forks.run("-c", APPEND, str(tmp_path / "state"), environment=environment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    told = len(killed.stdout.split())
    state = StateDir.open(tmp_path / "state")
    assert state.journal.count() in (told + 2, (told + 1) if told else 0)
    state.close()


def test_what_a_batch_holds_is_counted_before_the_call_returns(tmp_path: Path) -> None:
    state = grown(tmp_path / "state", range(1, 3))
    noted = state.acknowledged.read()
    assert noted == state.journal.head
    assert noted is not None
    assert noted.events == 3
    assert state.journal.gap_since(noted) is None
    state.close()
