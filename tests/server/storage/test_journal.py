from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support import accepted, registered

from fedmoe.federation.events import Event, ExpertRebased, ExpertRolledBack, GatewayMerged, WorkerRetracted
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.event_rows import GATEWAY
from fedmoe.server.storage.journal import DuplicateEventError, FormerIncarnation, Journal
from fedmoe.server.storage.postgres_journal import PostgresJournal
from fedmoe.server.storage.records import DataStatistic, Statistic, TokenRecord
from fedmoe.server.storage.sqlite_journal import SqliteJournal

EVENTS: list[Event] = [
    registered(),
    registered("sql", seed=2**64 - 1),
    accepted(1),
    replace(accepted(2, "w2"), staleness=1, coefficient=0.1 + 0.2, info={"loss": 1e-9, "steps": 3.0}),
    accepted(1, "w2", "sql", sequence=2**53),
    ExpertRolledBack("python", 1, 3, 'told to: "x" \N{SNOWMAN}', 1.5),
    WorkerRetracted("python", "w1", 1, 4, "", 2.5),
]


FOLD = GatewayMerged(1, 9, "a" * 64, {"python": 4}, {"python": 0}, {"python": 1.0}, 0.1 + 0.2, 0.5, ("one", "two"), 3.5)
WENT_ON = ExpertRebased("python", 1, "a" * 64, 2, 5, 3.5)


@pytest.fixture(params=["file", "memory", pytest.param("postgres", marks=pytest.mark.scale)])
def journal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Journal]:
    opened: Journal
    if request.param == "postgres":
        opened = PostgresJournal(request.getfixturevalue("postgres").schema())
    else:
        opened = SqliteJournal(tmp_path / "journal.sqlite" if request.param == "file" else None)
    yield opened
    opened.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite"


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[[], SqliteJournal]]:
    """Opens the journal in the file; whatever was opened is closed at the end."""
    journals: list[SqliteJournal] = []

    def open_it() -> SqliteJournal:
        journals.append(SqliteJournal(path))
        return journals[-1]

    yield open_it
    for journal in journals:
        journal.close()


def query(path: Path, statement: str) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(path)
    try:
        return list(connection.execute(statement))
    finally:
        connection.commit()
        connection.close()


# What every journal must do.


def test_an_empty_journal_is_empty(journal: Journal) -> None:
    assert (list(journal.events()), journal.count(), journal.tokens(), journal.statistics()) == ([], 0, [], [])
    assert journal.find_update("w1", "e1", 1) is None
    assert journal.snapshots("python") == {}
    assert journal.meta("anything") is None


def test_events_come_back_equal_and_in_order(journal: Journal) -> None:
    journal.append(EVENTS[:3])
    journal.append([])
    journal.append(EVENTS[3:])
    assert list(journal.events()) == EVENTS
    assert journal.count() == len(EVENTS)


def test_events_of_one_expert_from_a_version_on(journal: Journal) -> None:
    journal.append(EVENTS)
    assert list(journal.events("python")) == [
        e for e in EVENTS if not isinstance(e, GatewayMerged) and e.expert == "python"
    ]
    assert list(journal.events("python", after_version=2)) == EVENTS[-2:]
    assert list(journal.events("nobody")) == []


def test_an_update_is_found_by_its_identity(journal: Journal) -> None:
    journal.append(EVENTS)
    assert journal.find_update("w2", "e1", 2**53) == EVENTS[4]
    assert journal.find_update("w2", "e1", 7) is None
    assert journal.find_update("w2", "e2", 2**53) is None


def test_a_merge_and_the_experts_that_go_on_come_back_as_they_were_and_only_once(journal: Journal) -> None:
    journal.append([*EVENTS, FOLD, WENT_ON])
    assert list(journal.events()) == [*EVENTS, FOLD, WENT_ON]
    assert list(journal.events("python"))[-1] == WENT_ON
    assert list(journal.events(GATEWAY)) == [FOLD]
    assert journal.named_elsewhere("python", {FOLD.digest, "b" * 64}) == {FOLD.digest}
    for again in (FOLD, replace(FOLD, version=20), WENT_ON, replace(WENT_ON, gateway=2)):
        with pytest.raises(DuplicateEventError):
            journal.append([again])


@pytest.mark.parametrize(
    "repeated",
    [
        replace(accepted(5), sequence=2, worker="w2"),  # the same update at another version
        replace(accepted(9, expert="sql"), sequence=2, worker="w2"),  # the same update for another expert
        replace(accepted(2), sequence=99),  # another update at the same version
        registered(),
        ExpertRolledBack("python", 0, 4, "", 1.0),
    ],
)
def test_an_event_that_is_there_already_refuses_its_whole_batch(journal: Journal, repeated: Event) -> None:
    journal.append(EVENTS)
    for batch in ([accepted(5, sequence=50), repeated], [repeated, accepted(5, sequence=50)]):
        with pytest.raises(DuplicateEventError):
            journal.append(batch)
        assert list(journal.events()) == EVENTS
    journal.append([accepted(5, sequence=50)])
    assert journal.count() == len(EVENTS) + 1


def test_a_batch_that_repeats_itself_is_refused(journal: Journal) -> None:
    journal.append([registered()])
    with pytest.raises(DuplicateEventError):
        journal.append([accepted(1), accepted(2, sequence=1)])
    assert journal.count() == 1


def test_a_number_json_cannot_hold_is_refused_and_leaves_nothing(journal: Journal) -> None:
    with pytest.raises(ValueError, match="JSON"):
        journal.append([registered(), replace(accepted(1), coefficient=float("nan"))])
    assert journal.count() == 0


def test_snapshots_by_version(journal: Journal) -> None:
    journal.add_snapshot("python", 50, "a")
    journal.add_snapshot("python", 100, "b")
    journal.add_snapshot("python", 100, "c")
    journal.add_snapshot("sql", 100, "d")
    journal.drop_snapshot("python", 50)
    journal.drop_snapshot("python", 51)
    assert (journal.snapshots("python"), journal.snapshots("sql")) == ({100: "c"}, {100: "d"})


def test_blobs_named_by_other_experts(journal: Journal) -> None:
    journal.append([accepted(1, digest="mine"), accepted(2, digest="both")])
    journal.append([accepted(1, "w2", "sql", sequence=8, digest="both"), accepted(2, "w2", "sql", digest="theirs")])
    journal.add_snapshot("python", 2, "my snapshot")
    journal.add_snapshot("sql", 2, "their snapshot")
    asked = ["mine", "both", "my snapshot", "their snapshot", "nobody's"]
    assert journal.named_elsewhere("python", asked) == {"both", "their snapshot"}
    assert journal.named_elsewhere("python", []) == set()


def test_statistics_in_order(journal: Journal) -> None:
    kept = [
        Statistic(name, "w1", "loss", {"held_out": value}, value)
        for name, value in (("a", 0.5), ("b", 1.5), ("a", 2.5))
    ]
    for statistic in kept:
        journal.add_statistic(statistic)
    assert journal.statistics() == kept


def test_data_statistics_in_order(journal: Journal) -> None:
    kept = [DataStatistic("a", worker, "moments", digest, 7, 0.5) for worker, digest in (("w2", "x"), ("w1", "y"))]
    for statistic in [*kept, kept[0]]:
        journal.add_data_statistic(statistic)
    assert journal.data_statistics() == [*kept, kept[0]]


def test_tokens_are_replaced_by_hash(journal: Journal) -> None:
    token = TokenRecord("h1", "worker", "w1", ("a", "b"), 12.5)
    journal.put_token(token)
    journal.put_token(TokenRecord("h2", "admin", None, ()))
    journal.put_token(replace(token, revoked=True))
    assert sorted(journal.tokens(), key=lambda t: t.hash) == [
        replace(token, revoked=True),
        TokenRecord("h2", "admin", None, ()),
    ]


def test_meta_is_replaced_by_key(journal: Journal) -> None:
    journal.set_meta("rule", "sgd")
    journal.set_meta("rule", "adam")
    assert journal.meta("rule") == "adam"


def test_many_threads_append_and_read(journal: Journal) -> None:
    def work(worker: str) -> None:
        for sequence in range(20):
            journal.append([accepted(sequence + 1, worker, f"expert-{worker}")])
            assert journal.find_update(worker, "e1", sequence + 1) is not None

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert journal.count() == 80
    assert [event.version for event in journal.events("expert-w2")] == list(range(1, 21))  # type: ignore[union-attr]


def test_the_digest_of_a_version_is_kept_with_the_event_that_made_it(journal: Journal) -> None:
    journal.append([registered(), accepted(1)], [None, "a" * 64])
    journal.append([accepted(2)])
    assert [journal.version_digest("python", version) for version in range(4)] == [None, "a" * 64, None, None]
    assert journal.version_digest("sql", 1) is None
    with pytest.raises(ValueError, match="zip"):
        journal.append([accepted(3)], [])


def test_a_new_incarnation_has_a_name_of_its_own_and_the_one_before_is_kept(journal: Journal) -> None:
    first = journal.meta("incarnation")
    journal.append(EVENTS)
    second = journal.begin_incarnation()
    third = journal.begin_incarnation()
    assert len({first, second, third}) == 3
    assert journal.meta("incarnation") == third
    assert journal.former_incarnations() == [
        FormerIncarnation(first or "", 7),
        FormerIncarnation(second, 7),
    ]


# What a journal in a file must do beyond that.


def test_everything_is_there_after_reopening(path: Path, opened: Callable[[], SqliteJournal]) -> None:
    first = opened()
    first.append(EVENTS)
    first.add_snapshot("python", 2, "a")
    first.set_meta("rule", "sgd")
    first.close()
    again = opened()
    assert list(again.events()) == EVENTS
    assert (again.snapshots("python"), again.meta("rule")) == ({2: "a"}, "sgd")
    assert query(path, "PRAGMA integrity_check") == [("ok",)]


def test_a_journal_from_before_data_statistics_gets_their_table(
    path: Path, opened: Callable[[], SqliteJournal]
) -> None:
    first = opened()
    first.append(EVENTS)
    first.close()
    query(path, "DROP TABLE data_statistics")
    query(path, "DELETE FROM seals WHERE place = 'data_statistics' OR row = '[\"sealed\"]'")
    query(path, "DELETE FROM meta WHERE key = 'sealed'")
    again = opened()
    assert (again.data_statistics(), list(again.events())) == ([], EVENTS)


def test_a_commit_survives_a_power_cut(opened: Callable[[], SqliteJournal]) -> None:
    """WAL with synchronous=FULL is one fsync per commit; NORMAL would lose the last commits of a power cut."""
    connection = opened()._connection
    assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
    assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2


@pytest.mark.parametrize("name", ["with space.sqlite", "what?.sqlite", "100%25#.sqlite", "bücher.sqlite"])
def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    journal = SqliteJournal(tmp_path / name)
    journal.append(EVENTS)
    journal.close()
    assert {entry.name for entry in tmp_path.iterdir()} == {name}


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ("3", "schema 3, this program reads 2; run the FedMoE version that wrote it"),
        ("1", "schema 1, this program reads 2; .*'fedmoe coordinator'"),
        ("x", "its schema is 'x', which no version of this program writes"),
    ],
)
def test_another_schema_is_refused_and_left_alone(
    path: Path, opened: Callable[[], SqliteJournal], schema: str, told: str
) -> None:
    opened().close()
    query(path, f"UPDATE meta SET value = '{schema}' WHERE key = 'schema_version'")
    query(path, "DROP TABLE statistics")
    if schema == "1":
        for column in ("chain", "version_digest"):
            query(path, f"ALTER TABLE events DROP COLUMN {column}")
    with pytest.raises(StorageFailedError, match=told):
        opened()
    assert ("statistics",) not in query(path, "SELECT name FROM sqlite_master")


@pytest.mark.parametrize("content", [b"this is no database, but a text of some length " * 50, bytes(5000)])
def test_a_file_that_is_no_journal_is_refused_with_the_way_out(
    path: Path, opened: Callable[[], SqliteJournal], content: bytes
) -> None:
    path.write_bytes(content)
    with pytest.raises(StorageFailedError, match=r"not a database.*backup.*--state-dir"):
        opened()
    assert path.read_bytes() == content


def test_a_folder_in_the_journals_place_is_refused(path: Path, opened: Callable[[], SqliteJournal]) -> None:
    path.mkdir()
    with pytest.raises(StorageFailedError, match="cannot be opened"):
        opened()


def damage(path: Path, keep_pages: int) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: 4096 * keep_pages] + b"\xff" * (len(whole) - 4096 * keep_pages))


def filled(path: Path) -> None:
    journal = SqliteJournal(path)
    journal.append([registered(), *(accepted(version) for version in range(1, 200))])
    journal.close()


@pytest.mark.parametrize("keep_pages", [1, 2, 20])
def test_a_damaged_journal_is_refused_at_the_start(
    path: Path, opened: Callable[[], SqliteJournal], keep_pages: int
) -> None:
    filled(path)
    damage(path, keep_pages)
    with pytest.raises(StorageFailedError, match=r"cannot be opened: .*\. Restore it from a backup"):
        opened()


def test_damage_that_comes_later_is_a_storage_failure(path: Path, opened: Callable[[], SqliteJournal]) -> None:
    filled(path)
    journal = opened()
    journal._connection.exec_driver_sql("PRAGMA cache_size = 0")
    journal._connection.rollback()
    damage(path, 20)
    with pytest.raises(StorageFailedError, match="malformed"):
        list(journal.events())
    with pytest.raises(StorageFailedError, match="malformed"):
        journal.append([accepted(version) for version in range(200, 300)])


def test_a_full_disk_refuses_and_recovers(opened: Callable[[], SqliteJournal]) -> None:
    """SQLite's own page limit gives the very error of a full disk."""
    journal = opened()
    journal.append(EVENTS)
    journal._connection.exec_driver_sql("PRAGMA max_page_count = 1")  # it cannot go below the size there is
    many = [accepted(version) for version in range(10, 500)]
    with pytest.raises(RefusedError) as refused:
        journal.append(many)
    assert refused.value.code == "disk_full"
    assert list(journal.events()) == EVENTS
    journal._connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    journal._connection.rollback()
    journal.append(many)
    assert journal.count() == len(EVENTS) + len(many)


def test_a_journal_that_another_program_holds_is_busy_and_not_failed(
    path: Path, opened: Callable[[], SqliteJournal]
) -> None:
    """Fault 72."""
    journal = opened()
    journal._connection.exec_driver_sql("PRAGMA busy_timeout = 50")
    journal._connection.rollback()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(RefusedError) as refused:
        journal.append(EVENTS)
    assert refused.value.code == "busy"
    holder.close()
    journal.append(EVENTS)
    assert journal.count() == len(EVENTS)


def test_an_io_error_is_a_storage_failure(opened: Callable[[], SqliteJournal], monkeypatch: pytest.MonkeyPatch) -> None:
    import sqlalchemy as sa

    journal = opened()
    broken = sqlite3.OperationalError("disk I/O error")
    broken.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC

    def execute(*_: object) -> None:
        raise sa.exc.OperationalError("insert", {}, broken)

    with monkeypatch.context() as patched:
        patched.setattr(journal, "_connection", _Broken(execute))
        with pytest.raises(StorageFailedError, match="disk I/O error"):
            journal.append(EVENTS)


class _Broken:
    """A connection whose every statement fails."""

    def __init__(self, execute: Callable[..., None]) -> None:
        self.execute = execute

    def rollback(self) -> None:
        return
