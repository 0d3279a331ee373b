"""`fedmoe state verify`: says of a whole state directory that it is, and names what was done to any other."""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from crash_house import House
from hypothesis import given, settings
from hypothesis import strategies as st
from state_fixture import unpacked
from support import fold, make_body
from typer.testing import CliRunner

from fedmoe.cli.commands import app
from fedmoe.coordinator import Aggregation
from fedmoe.server.history.verification import VerificationReport, verify_state
from fedmoe.server.storage.audit import AUDIT_FILE, AUDIT_HEAD, AuditHead, line_of
from fedmoe.server.storage.state_dir import StateDir, StateDirError


@cache
def whole() -> Path:
    """A state directory with all kinds of events, closed."""
    path = Path(mkdtemp()) / "state"
    state = StateDir.open(path)
    house = House.on(state.journal, state.blobs, Aggregation(server_optimizer="nesterov"))
    house.register()
    house.register("sql", seed=7)
    house.train(["w1", "w2", "w1", "w3", "w2"])
    house.train(["v1", "v2"], "sql")
    house.retract("w2")
    house.roll_back(2)
    house.train(["w1"])
    house.service.close()
    state.close()
    return path


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(whole(), folder / "state"))


def edit(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path / "journal.sqlite")
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_whole_state_directory_is_found_whole_and_stays_as_it_is(tmp_path: Path) -> None:
    path = copied(tmp_path)
    before = {file.name: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "lock"}
    found = verify_state(path)
    assert (found.findings, found.absent, found.unnamed, found.unproven) == ([], 0, 0, 0)
    assert (found.events, found.versions) == (12, 10)
    after = {file.name: file.read_bytes() for file in path.rglob("*") if file.is_file() and file.name != "lock"}
    assert after == before


def flip(file: Path, place: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(bytes(data))


def blob_of(path: Path, version: int) -> Path:
    connection = sqlite3.connect(path / "journal.sqlite")
    query = "SELECT digest FROM events WHERE expert = 'python' AND version = ?"
    (digest,) = connection.execute(query, [version]).fetchone()
    connection.close()
    return path / "blobs" / str(digest)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "4 .* is not as it was written": lambda path: edit(path, "UPDATE events SET sequence = 77 WHERE id = 4"),
    "ends after 11 events, written were 12": lambda path: edit(path, "DELETE FROM events WHERE id = 12"),
    "of meta is not as it was": lambda path: edit(path, "UPDATE meta SET value = 'sgd' WHERE key = 'update_rule'"),
    "the seals of .*tokens.* are gone": lambda path: edit(path, "DROP TABLE seals"),
    "the seals of tokens are gone": lambda path: edit(path, "DELETE FROM seals WHERE place = 'tokens'"),
    "of snapshots": lambda path: edit(path, "UPDATE snapshots SET digest = 'f'"),
    "holds bytes with digest": lambda path: flip(blob_of(path, 2)),
    "the journal's file|cannot be read": lambda path: flip(path / "journal.sqlite", 3),
    "python cannot be rebuilt at its newest version 8": lambda path: blob_of(path, 8).unlink(),
}


@pytest.mark.parametrize("named", sorted(DAMAGE))
def test_what_was_done_to_it_is_named(tmp_path: Path, named: str) -> None:
    path = copied(tmp_path)
    DAMAGE[named](path)
    answer = CliRunner().invoke(app, ["state", "verify", "--state-dir", str(path), "--json"])
    assert answer.exit_code == 74, answer.output
    findings = json.loads(answer.output)["findings"]
    assert any(re.search(named, finding) for finding in findings), findings


def test_a_line_taken_out_of_the_audit_log_is_found_85(tmp_path: Path) -> None:
    path = copied(tmp_path)
    lines = []
    head = AuditHead()
    for what in ("start", "push", "stop"):
        line, head = line_of(head, {"what": what})
        lines.append(line)
    state = StateDir.open(path)
    state.journal.set_meta(AUDIT_HEAD, str(head))
    state.close()
    (path / AUDIT_FILE).write_bytes(b"".join(lines))
    assert verify_state(path).findings == []
    (path / AUDIT_FILE).write_bytes(lines[0] + lines[2])
    assert verify_state(path).findings == ["audit.jsonl: line 2 (n 3) does not follow n 1"]


def test_an_older_journal_is_found(tmp_path: Path) -> None:
    path = copied(tmp_path)
    shutil.copy(path / "journal.sqlite", tmp_path / "older")
    state = StateDir.open(path)
    state.journal.set_meta("newer", "yes")
    state.close()
    shutil.copy(tmp_path / "older", path / "journal.sqlite")
    assert "not the newest" in verify_state(path).findings[0]


@given(place=st.integers(100, 10**6), bit=st.integers(0, 7))
@settings(max_examples=40, deadline=None)
def test_any_flipped_bit_of_a_blob_or_the_journal_is_found_or_changes_nothing(place: int, bit: int) -> None:
    folder = Path(mkdtemp())
    path = copied(folder)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name not in ("lock", "acknowledged"))
    file = files[place % len(files)]
    data = bytearray(file.read_bytes())
    data[place % len(data)] ^= 1 << bit
    file.write_bytes(bytes(data))
    before = rows(whole())
    found = verify_state(path)
    if not found.findings:
        assert file.name == "journal.sqlite", "a flipped bit of a blob is always found"
        assert rows(path) == before
    shutil.rmtree(folder)


def rows(path: Path) -> list[list[tuple[object, ...]]]:
    connection = sqlite3.connect(path / "journal.sqlite")
    tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY 1")]
    found = [connection.execute(f"SELECT * FROM {table}").fetchall() for table in tables if table != "sqlite_sequence"]
    connection.close()
    return found


def test_people_read_what_was_looked_at(tmp_path: Path) -> None:
    path = copied(tmp_path)
    answer = CliRunner().invoke(app, ["state", "verify", "--state-dir", str(path)])
    assert answer.exit_code == 0
    assert "12 events, 10 versions" in answer.output
    assert "all is as it was written" in answer.output
    flip(blob_of(path, 1))
    answer = CliRunner().invoke(app, ["state", "verify", "--state-dir", str(path)])
    assert answer.exit_code == 74
    assert "WRONG  blob" in answer.output


def test_what_is_in_use_or_no_state_directory_is_refused(tmp_path: Path) -> None:
    state = StateDir.open(copied(tmp_path))
    with pytest.raises(StateDirError, match=r"in use .* stop it"):
        verify_state(state.path)
    state.close()
    with pytest.raises(StateDirError, match="no state directory"):
        verify_state(tmp_path)


def test_one_of_schema_1_is_told_how_to_be_brought_to_this_one(tmp_path: Path) -> None:
    path = unpacked(tmp_path, "initial")
    (finding,) = verify_state(path).findings
    assert str(path / "journal.sqlite") in finding
    assert "'fedmoe coordinator'" in finding


def test_one_that_was_of_schema_1_is_whole(tmp_path: Path) -> None:
    path = unpacked(tmp_path, "initial")
    StateDir.open(path).close()
    found = verify_state(path)
    assert (found.findings, found.versions, found.unproven) == ([], 58, 58)


def test_versions_whose_bytes_were_let_go_of_are_unproven_and_no_finding(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state = StateDir.open(path)
    house = House.on(state.journal, state.blobs, Aggregation(), keep_updates=3)
    house.register()
    for number in range(12):
        house.push(make_body(number), number)
    house.settle()
    house.service.close()
    state.close()
    found: VerificationReport = verify_state(path)
    assert found.findings == []
    assert found.absent > 0
    assert 0 < found.unproven < found.versions


def test_gateways_that_experts_went_on_from_are_held_against_their_digests(tmp_path: Path) -> None:
    path = tmp_path / "state"
    state = StateDir.open(path)
    house = House.on(state.journal, state.blobs, Aggregation(merge_after=20), merges_by_itself=False)
    house.register()
    for number in range(4):
        house.push(make_body(number), number, steps=10 * (number + 1))
    assert fold(house.service) > 0
    assert state.journal.version_digest("@gateway", 1) is not None
    house.service.close()
    state.close()
    found = verify_state(path)
    assert (found.findings, found.unproven) == ([], 0)
    assert found.versions == found.events - 1
