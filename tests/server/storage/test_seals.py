"""Rows beside the events: what anything but the journal did to one is found at the start."""

from __future__ import annotations

import sqlite3
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import accepted, registered

from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.records import DataStatistic, GatewayVerdict, Statistic, TokenRecord
from fedmoe.server.storage.sqlite_journal import SqliteJournal

SEALED = ("meta", "snapshots", "statistics", "data_statistics", "tokens", "gateway_verdicts")


def filled(path: Path | None) -> SqliteJournal:
    journal = SqliteJournal(path)
    journal.append([registered(), accepted(1)])
    for version in (50, 100):
        journal.add_snapshot("python", version, "a" * 64)
    journal.add_snapshot("python", 100, "b" * 64)  # takes the other's place
    journal.add_snapshot("python", 150, "c" * 64)
    journal.drop_snapshot("python", 150)
    for number in range(2):
        journal.add_statistic(Statistic("python", f"w{number}", "held_out", {"loss": 1.5 + number}, 2.0))
        journal.add_data_statistic(DataStatistic("python", f"w{number}", "moments", f"{number}" * 64, 12, 3.0))
        journal.add_verdict(GatewayVerdict(f"{number}" * 64, {"scale": 0.1 + 0.2}, 4.0))
        journal.put_token(TokenRecord(f"{number}" * 64, "worker", "w1", ("python",), 5.0))
    journal.put_token(TokenRecord("1" * 64, "worker", "w1", ("python",), 5.0, revoked=True))
    journal.set_meta("update_rule", "adam")
    journal.set_meta("update_rule", "sgd")
    return journal


@cache
def whole() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "journal.sqlite"
        filled(path).close()
        return path.read_bytes()


def written(folder: Path) -> Path:
    path = folder / "journal.sqlite"
    path.write_bytes(whole())
    return path


def edit(path: Path, statement: str, *values: object) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def read(path: Path, statement: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        return connection.execute(statement).fetchall()
    finally:
        connection.close()


def test_what_the_journal_itself_wrote_fits(tmp_path: Path) -> None:
    path = written(tmp_path)
    for _ in range(2):
        SqliteJournal(path).close()
    assert {place for (place,) in read(path, "SELECT place FROM seals WHERE row = ''")} >= set(SEALED)


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE tokens SET revoked = 0", "tokens is not as it was written"),
        ("UPDATE tokens SET expires_at = NULL WHERE hash LIKE '0%'", 'row ["000.* tokens is not as it was written'),
        ("INSERT INTO tokens VALUES ('f', 'admin', NULL, NULL, NULL, 0)", "tokens was not written by the journal"),
        ("DELETE FROM tokens WHERE hash LIKE '1%'", "tokens is gone"),
        ("DROP TABLE tokens", "tokens is gone with its table"),
        ("UPDATE meta SET value = 'nesterov' WHERE key = 'update_rule'", 'row ["update_rule"] of meta is not'),
        ("DELETE FROM meta WHERE key = 'update_rule'", 'row ["update_rule"] of meta is gone'),
        ("UPDATE data_statistics SET digest = '2' WHERE id = 1", "row [1] of data_statistics is not as it was written"),
        ("UPDATE data_statistics SET id = 7 WHERE id = 1", "data_statistics"),
        ("UPDATE gateway_verdicts SET payload = replace(payload, '0.3', '0.4')", "gateway_verdicts is not as"),
        ("UPDATE statistics SET payload = replace(payload, '1.5', '0.5')", "row [1] of statistics is not as it was"),
        ("UPDATE seals SET seal = '0' WHERE place = 'tokens' AND row != ''", "tokens is not as it was written"),
    ],
)
def test_what_something_else_did_is_found_and_named(tmp_path: Path, statement: str, named: str) -> None:
    path = written(tmp_path)
    edit(path, statement)
    pattern = named.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(StorageFailedError, match=rf"damaged or changed: .*{pattern}.*fedmoe state restore"):
        SqliteJournal(path)


def test_damaged_rows_are_left_out_when_told_and_what_meta_says_never_is(tmp_path: Path) -> None:
    path = written(tmp_path)
    edit(path, "UPDATE tokens SET revoked = 0")
    edit(path, "DELETE FROM statistics WHERE id = 1")
    with pytest.raises(StorageFailedError, match="--skip-damaged"):
        SqliteJournal(path)
    journal = SqliteJournal(path, skip_damaged=True)
    assert [token.hash[0] for token in journal.tokens()] == ["0"]
    assert len(journal.statistics()) == 1
    journal.close()
    SqliteJournal(path).close()
    edit(path, "UPDATE meta SET value = 'adam' WHERE key = 'update_rule'")
    with pytest.raises(StorageFailedError, match="update_rule") as refused:
        SqliteJournal(path, skip_damaged=True)
    assert "--skip-damaged" not in str(refused.value)


def test_a_snapshot_only_saves_time_and_goes_when_its_row_is_damaged(tmp_path: Path) -> None:
    path = written(tmp_path)
    edit(path, "UPDATE snapshots SET version = 51 WHERE version = 50")
    journal = SqliteJournal(path)
    assert journal.snapshots("python") == {100: "b" * 64}
    journal.close()
    SqliteJournal(path).close()


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_other_value_in_any_field_is_found(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = written(Path(folder))
        table = data.draw(st.sampled_from([name for name in SEALED if name != "snapshots"]))
        column = data.draw(st.sampled_from([str(row[1]) for row in read(path, f"PRAGMA table_info({table})")]))
        rowid, before = data.draw(st.sampled_from(read(path, f"SELECT rowid, {column} FROM {table}")))
        value = data.draw(
            st.none() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=9)
        )
        try:
            edit(path, f"UPDATE {table} SET {column} = ? WHERE rowid = ?", value, rowid)
        except (sqlite3.IntegrityError, UnicodeEncodeError):
            return  # SQLite itself holds what must be unique and of a type
        if read(path, f"SELECT {column} FROM {table} WHERE rowid = {rowid}") in ([(before,)], []):
            return  # the same value, perhaps in another type that the column turns into its own
        with pytest.raises(StorageFailedError):
            SqliteJournal(path)


def test_a_table_of_a_later_build_is_sealed_when_it_comes(tmp_path: Path) -> None:
    path = written(tmp_path)
    edit(path, "CREATE TABLE later (name TEXT PRIMARY KEY, number REAL)")
    edit(path, "INSERT INTO later VALUES ('a', 1.5)")
    SqliteJournal(path).close()
    SqliteJournal(path).close()
    edit(path, "UPDATE later SET number = 2.5")
    with pytest.raises(StorageFailedError, match="of later is not as it was written"):
        SqliteJournal(path)


def test_in_memory_it_works_the_same() -> None:
    filled(None).close()
