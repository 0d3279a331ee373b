from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import accepted, registered, sha256

from fedmoe.federation.events import Event, ExpertRolledBack, WorkerRetracted
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.chain import GENESIS, BrokenChainError, ChainEnd, check, link
from fedmoe.server.storage.journal import DuplicateEventError
from fedmoe.server.storage.sqlite_journal import SqliteJournal

EVENTS: list[Event] = [
    registered(),
    registered("sql", seed=2**64 - 1),
    *(replace(accepted(version, f"w{version % 2}"), coefficient=0.5 / version) for version in range(1, 6)),
    accepted(1, "v", "sql", sequence=2**53),
    ExpertRolledBack("python", 1, 6, 'told to: "x" \N{SNOWMAN}', 1.5),
    WorkerRetracted("python", "w1", 1, 7, "", 2.5),
]


@cache
def whole() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "journal.sqlite"
        journal = SqliteJournal(path)
        journal.append(EVENTS[:4], [None, None, sha256(b"1"), sha256(b"2")])
        journal.append(EVENTS[4:])
        journal.close()
        return path.read_bytes()


def written(folder: Path) -> Path:
    path = folder / "journal.sqlite"
    path.write_bytes(whole())
    return path


def edit(path: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    connection = sqlite3.connect(path)
    for statement, values in statements:
        connection.execute(statement, values)
    connection.commit()
    connection.close()


def refused(path: Path) -> str:
    with pytest.raises(StorageFailedError, match=r"damaged or changed: .*fedmoe state restore") as error:
        SqliteJournal(path)
    return str(error.value)


def test_a_row_is_hashed_with_the_row_before() -> None:
    row = (1, "update", "python", 1, "w1", "e1", 0, "a", "{}", None)
    assert link(GENESIS, row) == sha256((GENESIS + json.dumps(list(row), separators=(",", ":"))).encode())
    assert link("1" * 64, row) != link(GENESIS, row)
    assert check([(*row, link(GENESIS, row))]) == ChainEnd(1, link(GENESIS, row), 1)
    assert check([]) == ChainEnd()


def test_an_edited_coefficient_is_found_at_the_start_and_named(tmp_path: Path) -> None:
    path = written(tmp_path)
    edit(path, ("UPDATE events SET payload = replace(payload, '\"coefficient\": 0.25', '\"coefficient\": 0.75')", ()))
    assert "row 4 (event 4: 'python' version 2) is not as it was written" in refused(path)


def test_a_row_in_anothers_place_is_found(tmp_path: Path) -> None:
    path = written(tmp_path)
    swap = "UPDATE events SET id = ? WHERE id = ?"
    edit(path, (swap, (99, 5)), (swap, (5, 6)), (swap, (6, 99)))
    assert "event 5: 'python' version 4" in refused(path)


@pytest.mark.parametrize("row", range(1, len(EVENTS)))
def test_a_row_that_was_taken_out_is_found(tmp_path: Path, row: int) -> None:
    path = written(tmp_path)
    edit(path, ("DELETE FROM events WHERE id = ?", (row,)))
    refused(path)


COLUMNS = {
    "id": st.integers(100, 200),
    "kind": st.text(),
    "expert": st.text(),
    "version": st.integers(-(2**63), 2**63 - 1),
    "worker": st.text() | st.none(),
    "epoch": st.text() | st.none(),
    "sequence": st.integers(-(2**63), 2**63 - 1) | st.none(),
    "digest": st.text() | st.none() | st.binary(),
    "payload": st.text() | st.binary(),
    "version_digest": st.text() | st.none(),
    "chain": st.text(),
}


@given(
    row=st.integers(1, len(EVENTS)),
    change=st.sampled_from(sorted(COLUMNS)).flatmap(lambda name: st.tuples(st.just(name), COLUMNS[name])),
)
@settings(max_examples=60, deadline=None)
def test_any_other_value_in_any_field_is_found(row: int, change: tuple[str, object]) -> None:
    """Fault 73."""
    name, value = change
    with TemporaryDirectory() as folder:
        path = written(Path(folder))
        connection = sqlite3.connect(path)
        before = connection.execute(f"SELECT {name} FROM events WHERE id = ?", (row,)).fetchone()[0]
        connection.close()
        if value == before:
            return
        try:
            edit(path, (f"UPDATE events SET {name} = ? WHERE id = ?", (value, row)))
        except (sqlite3.IntegrityError, UnicodeEncodeError):
            return  # SQLite itself holds what must be unique, and takes no half characters
        refused(path)


@given(row=st.integers(1, len(EVENTS)), place=st.integers(0), byte=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_any_changed_byte_of_a_payload_is_found(row: int, place: int, byte: int) -> None:
    with TemporaryDirectory() as folder:
        path = written(Path(folder))
        connection = sqlite3.connect(path)
        payload = connection.execute("SELECT CAST(payload AS BLOB) FROM events WHERE id = ?", (row,)).fetchone()[0]
        connection.close()
        at = place % len(payload)
        changed = payload[:at] + bytes([payload[at] ^ byte]) + payload[at + 1 :]
        edit(path, ("UPDATE events SET payload = CAST(? AS TEXT) WHERE id = ?", (changed, row)))
        with pytest.raises(StorageFailedError):
            SqliteJournal(path)


def test_what_no_journal_wrote_breaks_the_chain() -> None:
    for odd in (b"bytes", float("nan"), object()):
        with pytest.raises(BrokenChainError, match="row 1 "):
            check([(1, "update", "python", 1, "w1", "e1", 0, "a", odd, None, GENESIS)])


def test_a_journal_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = written(tmp_path)
    journal = SqliteJournal(path)
    journal.append([accepted(8, sequence=77)])
    journal.close()
    journal = SqliteJournal(path)
    assert journal.count() == len(EVENTS) + 1
    journal.close()


def test_a_batch_that_is_refused_leaves_no_gap_in_the_chain(tmp_path: Path) -> None:
    path = written(tmp_path)
    journal = SqliteJournal(path)
    with pytest.raises(DuplicateEventError):
        journal.append([accepted(8, sequence=77), registered()])
    journal.append([accepted(8, sequence=78)])
    journal.close()
    SqliteJournal(path).close()


WORKERS = st.sampled_from(["w1", "w2", "w3"])


@st.composite
def pasts(draw: st.DrawFn) -> list[list[Event]]:
    """Batches of events as a federation may bring them about: what lands on which expert, in which order."""
    versions = {"python": 0, "sql": 0}
    events: list[Event] = [registered(), registered("sql")]
    for number in range(draw(st.integers(1, 12))):
        name = draw(st.sampled_from(sorted(versions)))
        newest, at = versions[name], float(number)
        versions[name] += 1
        kind = draw(st.sampled_from(["update", "update", "update", "rollback", "retract"]))
        if kind == "update" or newest == 0:
            update = accepted(newest + 1, draw(WORKERS), name, sequence=number)
            events.append(replace(update, coefficient=draw(st.floats(0.01, 1)), staleness=draw(st.integers(0, 9))))
        elif kind == "rollback":
            events.append(ExpertRolledBack(name, draw(st.integers(0, newest - 1)), newest + 1, draw(st.text()), at))
        else:
            events.append(WorkerRetracted(name, draw(WORKERS), 1, newest + 1, "", at))
    cuts = sorted(draw(st.sets(st.integers(1, len(events) - 1), max_size=4)))
    return [events[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(events)], strict=True)]


@given(batches=pasts(), data=st.data())
@settings(max_examples=50, deadline=None)
def test_whatever_is_done_to_the_rows_of_any_past_is_found(batches: list[list[Event]], data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "journal.sqlite"
        journal = SqliteJournal(path)
        for batch in batches:
            journal.append(batch, [sha256(repr(event).encode()) for event in batch])
        journal.close()
        count = sum(map(len, batches))
        one, other = (data.draw(st.integers(1, count), label="row") for _ in range(2))
        take, move = "DELETE FROM events WHERE id = ?", "UPDATE events SET id = ? WHERE id = ?"
        copy = "UPDATE events SET payload = (SELECT payload FROM events WHERE id = ?) WHERE id = ?"
        digit = "UPDATE events SET payload = replace(payload, ?, ?) WHERE id = ?"
        match data.draw(st.sampled_from(["take", "cut", "swap", "copy", "digit", "again"])):
            case "take":
                edit(path, (take, (one,)))
            case "cut":
                edit(path, ("DELETE FROM events WHERE id >= ?", (one,)))
            case "swap" if one != other:
                edit(path, (move, (count + 9, one)), (move, (one, other)), (move, (other, count + 9)))
            case "copy" if one != other:
                edit(path, (copy, (one, other)))
            case "digit":
                payload = read_payload(path, one)
                place = data.draw(st.sampled_from([i for i, sign in enumerate(payload) if sign.isdigit()]))
                changed = payload[:place] + str((int(payload[place]) + 1) % 10) + payload[place + 1 :]
                edit(path, (digit, (payload, changed, one)))
            case "again":
                columns = "kind, expert || 'x', version, payload, version_digest, chain"
                names = "kind, expert, version, payload, version_digest, chain"
                edit(path, (f"INSERT INTO events ({names}) SELECT {columns} FROM events WHERE id = ?", (one,)))
            case _:
                return
        refused(path)


def read_payload(path: Path, row: int) -> str:
    connection = sqlite3.connect(path)
    try:
        return str(connection.execute("SELECT payload FROM events WHERE id = ?", (row,)).fetchone()[0])
    finally:
        connection.close()
