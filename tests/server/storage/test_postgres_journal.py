"""What the journal in PostgreSQL must do beyond the conformance of all journals, on a real server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa
from cut_proxy import CutProxy
from postgres_server import PostgresServer
from support import accepted, registered

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage import postgres as specifics
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.journal import DuplicateEventError, NotOwnerError
from fedmoe.server.storage.postgres import DatabaseUrlError, postgres_engine
from fedmoe.server.storage.postgres_journal import PostgresJournal
from fedmoe.server.storage.records import DataStatistic, GatewayVerdict, Statistic, TokenRecord
from fedmoe.server.storage.tables import TOKENS

pytestmark = pytest.mark.scale

Opener = Callable[..., PostgresJournal]


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.database()


@pytest.fixture
def opened(url: str) -> Iterator[Opener]:
    """Opens the journal of the test's database; whatever was opened is closed at the end."""
    journals: list[PostgresJournal] = []

    def open_it(at: str = url, **options: object) -> PostgresJournal:
        journals.append(PostgresJournal(at, **options))  # type: ignore[arg-type]
        return journals[-1]

    yield open_it
    for journal in journals:
        journal.close()


@pytest.fixture
def proxy(postgres: PostgresServer) -> Iterator[CutProxy]:
    made = CutProxy(postgres.port)
    yield made
    made.close()


def execute(url: str, *statements: str) -> None:
    """As another program would."""
    engine = postgres_engine(url)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.execute(sa.text(statement))
    engine.dispose()


def through(url: str, proxy: CutProxy) -> str:
    return str(sa.make_url(url).set(port=proxy.port))


def fill(journal: PostgresJournal) -> None:
    journal.append([registered(), accepted(1)], [None, "a" * 64])
    journal.add_snapshot("python", 50, "a" * 64)
    journal.add_snapshot("python", 50, "b" * 64)  # takes the other's place
    journal.add_snapshot("python", 99, "b" * 64)
    journal.drop_snapshot("python", 99)
    for number in range(2):
        journal.add_statistic(Statistic("python", f"w{number}", "held_out", {"loss": 1.5 + number}, 2))
        journal.add_data_statistic(DataStatistic("python", f"w{number}", "moments", f"{number}" * 64, 12, 0.1 + 0.2))
        journal.put_token(TokenRecord(f"{number}" * 64, "worker", "w1", ("python",), 5.0))
    journal.put_token(TokenRecord("1" * 64, "worker", "w1", ("python",), 5.0, revoked=True))
    journal.add_verdict(GatewayVerdict("c" * 64, {"scale": 0.1 + 0.2}, 4.0))
    journal.set_meta("update_rule", "sgd")


def test_everything_is_there_after_reopening(opened: Opener) -> None:
    first = opened()
    fill(first)
    before = (list(first.events()), first.tokens(), first.data_statistics(), first.verdicts(9), first.head)
    first.close()
    again = opened()
    assert (list(again.events()), again.tokens(), again.data_statistics(), again.verdicts(9), again.head) == before
    again.append([accepted(2)])
    again.close()
    assert opened().version_digest("python", 1) == "a" * 64


def test_a_value_that_the_database_cannot_hold_is_refused_and_nothing_stops(opened: Opener) -> None:
    journal = opened()
    journal.append([registered()])
    for odd in (accepted(1, worker="nul\0"), accepted(1, sequence=2**63), accepted(2**63)):
        with pytest.raises(RefusedError) as refused:
            journal.append([accepted(7, sequence=7), odd])
        assert refused.value.code == "invalid_request"
    journal.append([accepted(1)])
    assert (journal.count(), journal.head.events) == (2, 2)


# Who writes.


def test_a_second_coordinator_is_refused_until_the_first_is_gone(opened: Opener, url: str) -> None:
    first = opened()
    with pytest.raises(StorageFailedError, match="in use by another coordinator"):
        opened()
    first.append([registered()])
    first.close()
    assert opened().count() == 1


def test_federations_in_schemas_of_their_own_do_not_meet(opened: Opener, url: str) -> None:
    execute(url, "CREATE SCHEMA one", "CREATE SCHEMA two")
    one, two = (opened(f"{url}?options=-csearch_path%3D{name}") for name in ("one", "two"))
    one.append([registered()])
    assert (one.count(), two.count()) == (1, 0)


class Fence:
    """Counts transactions, and ends ownership when told to."""

    def __init__(self) -> None:
        self.calls, self.lost = 0, False

    def __call__(self, connection: sa.Connection) -> None:
        self.calls += 1
        assert (
            connection.execute(
                sa.text("SELECT count(*) FROM pg_locks WHERE relation = to_regclass('meta') AND pid = pg_backend_pid()")
            ).scalar_one()
            == 0
        ), "it comes first"
        if self.lost:
            raise NotOwnerError("told to")


def test_every_write_asks_the_fence_first_and_a_lost_term_writes_nothing(opened: Opener) -> None:
    fence = Fence()
    journal = opened(fence=fence)
    before = fence.calls
    fill(journal)
    assert fence.calls == before + 14
    head = journal.head
    fence.lost = True
    for write in (
        lambda: journal.append([accepted(2)]),
        lambda: journal.set_meta("update_rule", "adam"),
        lambda: journal.add_statistic(Statistic("python", "w1", "held_out", {}, 2.0)),
        lambda: journal.delete(TOKENS.delete()),
        journal.begin_incarnation,
    ):
        with pytest.raises(NotOwnerError, match="told to"):
            write()
    assert (journal.head, journal.count(), journal.meta("update_rule"), len(journal.tokens())) == (head, 2, "sgd", 2)
    fence.lost = False
    journal.append([accepted(2)])


def test_whoever_opens_with_a_fence_takes_over_and_the_one_before_finds_out(opened: Opener) -> None:
    old = opened(fence=Fence())
    old.append([registered()])
    new = opened(fence=Fence())
    with pytest.raises(NotOwnerError, match="another process writes"):
        old.append([accepted(1)])
    new.append([accepted(1)])
    assert (new.count(), new.head.events) == (2, 2)


def test_a_lock_that_was_lost_and_taken_by_another_stops_the_first(opened: Opener, url: str) -> None:
    first = opened()
    first.append([registered()])
    terminate(url)
    second = opened()
    second.append([accepted(1)])
    second.close()
    with pytest.raises(StorageFailedError, match="another process writes"):
        first.append([accepted(1, "w2")])
    assert opened().find_update("w1", "e1", 1) is not None


# Connections that break.


def terminate(url: str) -> None:
    """Have the server end every other connection to the database, as a failover does."""
    where = "datname = current_database() AND pid != pg_backend_pid()"
    execute(url, f"SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE {where}")


def test_a_connection_that_was_lost_while_idle_is_made_anew(opened: Opener, url: str) -> None:
    journal = opened()
    fill(journal)
    terminate(url)
    journal.append([accepted(2)])
    terminate(url)
    assert [event.version for event in journal.events("python", 0)] == [1, 2]  # type: ignore[union-attr]
    terminate(url)
    journal.set_meta("update_rule", "adam")
    journal.close()
    assert opened().meta("update_rule") == "adam"


@pytest.mark.parametrize("lost", ["lose", "lose the answer"])
def test_a_commit_whose_answer_never_came_is_neither_lost_nor_doubled(
    opened: Opener, url: str, proxy: CutProxy, lost: str
) -> None:
    journal = opened(through(url, proxy))
    journal.append([registered()])
    proxy.commit = lost  # type: ignore[assignment]
    journal.append([accepted(1)])
    proxy.commit = lost  # type: ignore[assignment]
    number = journal.add_statistic(Statistic("python", "w1", "held_out", {"loss": 1.0}, 2.0)).id
    proxy.commit = lost  # type: ignore[assignment]
    name = journal.begin_incarnation()
    journal.append([accepted(2)])
    assert proxy.cuts == 3
    assert [stored.id for stored in journal.stored_statistics()] == [number]
    assert (journal.count(), len(journal.former_incarnations()), journal.head.changes) == (3, 1, 5)
    with pytest.raises(DuplicateEventError):
        journal.append([accepted(2)])
    journal.close()
    again = opened()
    assert (again.count(), again.head, again.meta("incarnation")) == (3, journal.head, name)


def test_a_database_that_is_away_refuses_and_stops_nothing_but_a_commit_in_doubt_does(
    opened: Opener, url: str, proxy: CutProxy
) -> None:
    journal = opened(through(url, proxy), patience=0.3, patience_in_doubt=0.6)
    journal.append([registered()])
    proxy.closed = True
    proxy.cut()
    for ask in (lambda: journal.append([accepted(1)]), journal.count, lambda: list(journal.events())):
        with pytest.raises(RefusedError) as refused:
            ask()
        assert refused.value.code == "busy"
    proxy.closed = False
    journal.append([accepted(1)])
    proxy.commit, proxy.closed = "lose the answer", True
    with pytest.raises(StorageFailedError, match="nobody knows whether it came about"):
        journal.append([accepted(2)])
    journal.close()
    assert opened().count() == 3


def test_a_crash_of_the_server_loses_and_doubles_nothing(opened: Opener, postgres: PostgresServer) -> None:
    journal = opened(patience=100.0)
    journal.append([registered()])
    landed: list[int] = []

    def push() -> None:
        for version in range(1, 121):
            journal.append([accepted(version)])
            landed.append(version)

    pushing = threading.Thread(target=push)
    pushing.start()
    for least in (20, 60):
        while len(landed) < least and pushing.is_alive():
            pushing.join(0.005)
        postgres.stop("immediate")
        postgres.start()
    pushing.join(60)
    assert landed == list(range(1, 121))
    head = journal.head
    journal.close()
    again = opened()
    assert again.head == head
    assert [event.version for event in again.events("python", 0)] == landed  # type: ignore[union-attr]


def test_a_transaction_that_was_given_up_for_another_is_repeated_and_not_for_ever(opened: Opener) -> None:
    left = 0

    def conflict(connection: sa.Connection) -> None:
        nonlocal left
        if left:
            left -= 1
            connection.exec_driver_sql("DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$")

    journal = opened(fence=conflict)
    left = 3
    journal.append([registered()])
    left = 100
    with pytest.raises(StorageFailedError, match="conflict"):
        journal.append([accepted(1)])
    left = 0
    journal.append([accepted(1)])
    assert journal.count() == 2


def test_a_lock_of_another_program_is_waited_for_and_then_refused(
    opened: Opener, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(specifics, "_SESSION", ("SET lock_timeout = '200ms'",))
    journal = opened()
    engine = postgres_engine(url)
    with engine.connect() as holder:
        holder.exec_driver_sql("SELECT * FROM meta FOR UPDATE")
        with pytest.raises(RefusedError) as refused:
            journal.append([registered()])
        assert refused.value.code == "busy"
    engine.dispose()
    journal.append([registered()])
    assert journal.count() == 1


# What somebody else did.


@pytest.mark.parametrize(
    ("statement", "named"),
    [
        ("UPDATE tokens SET revoked = false", "tokens is not as it was written"),
        ("DELETE FROM tokens WHERE hash LIKE '1%'", "tokens is gone"),
        ("INSERT INTO tokens VALUES ('f', 'admin', NULL, NULL, NULL, false)", "tokens was not written by the journal"),
        ("UPDATE meta SET value = 'nesterov' WHERE key = 'update_rule'", "meta is not as it was written"),
        ("UPDATE statistics SET payload = replace(payload, '1.5', '0.5')", "statistics is not as it was written"),
        ("UPDATE data_statistics SET at = at + 1e-16", "data_statistics is not as it was written"),
        ("DROP TABLE tokens", "tokens is gone"),
        ("DELETE FROM seals", "was not written by the journal"),
        ("UPDATE events SET payload = replace(payload, '1.0', '2.0')", "is not as it was written"),
        ("DELETE FROM events WHERE id = 2", "the journal ends after 1 events, written were 2"),
        ("DELETE FROM meta", "the row of meta that says which schema it has is gone"),
    ],
)
def test_what_something_else_did_is_found_at_the_start_and_named(
    opened: Opener, url: str, statement: str, named: str
) -> None:
    journal = opened()
    fill(journal)
    journal.close()
    execute(url, statement)
    with pytest.raises(StorageFailedError, match=f"damaged or changed: .*{named}"):
        opened()


def test_damaged_rows_are_left_out_when_told(opened: Opener, url: str) -> None:
    journal = opened()
    fill(journal)
    journal.close()
    execute(url, "UPDATE tokens SET revoked = NOT revoked", "DELETE FROM statistics WHERE worker = 'w0'")
    with pytest.raises(StorageFailedError, match="--skip-damaged"):
        opened()
    journal = opened(skip_damaged=True)
    assert (journal.tokens(), [one.worker for one in journal.statistics()]) == ([], ["w1"])
    journal.close()
    assert len(opened().data_statistics()) == 2


def test_a_database_that_went_back_is_noticed_before_anything_is_added(opened: Opener, url: str) -> None:
    """A standby that lagged behind was promoted."""
    journal = opened()
    journal.append([registered(), accepted(1)])
    head = replace(journal.head, events=1, changes=0)
    execute(url, "DELETE FROM events WHERE id = 2", f"UPDATE meta SET value = '{head.to_text()}' WHERE key = 'head'")
    with pytest.raises(
        StorageFailedError, match=r"holds 1 events in 0 changes, 2 events in 1 changes were acknowledged"
    ):
        journal.append([accepted(2)])
    assert journal.count() == 1


def test_another_schema_is_refused_and_left_alone(opened: Opener, url: str) -> None:
    opened().close()
    execute(url, "UPDATE meta SET value = '3' WHERE key = 'schema_version'")
    with pytest.raises(StorageFailedError, match="schema 3, this program reads 2"):
        opened()


# What an operator configures.


def test_a_server_that_may_lose_commits_is_refused_unless_that_is_accepted(opened: Opener, url: str) -> None:
    execute(url, f"ALTER DATABASE {sa.make_url(url).database} SET synchronous_commit = off")
    with pytest.raises(StorageFailedError, match=r"synchronous_commit = off: .*--accept-database-loss"):
        opened()
    opened(accept_loss=True).append([registered()])


def test_a_password_is_in_no_message(postgres: PostgresServer) -> None:
    secret = "correct-horse"
    for url in (
        f"postgresql+psycopg://fedmoe:{secret}@127.0.0.1:1/none",
        f"postgresql+psycopg://fedmoe:{secret}@127.0.0.1:{postgres.port}/none",
        f"postgresql+psycopg://127.0.0.1:{postgres.port}/none?user=fedmoe&password={secret}",
        f"postgresql+psycopg://fedmoe:{secret}@127.0.0.1:{postgres.port}/none?sslmode=require",
        f"mysql://fedmoe:{secret}@127.0.0.1/none",
        f"{secret}",
        f"postgresql+psycopg://fedmoe:{secret}@[127.0.0.1/none",
        f"postgresql+psycopg://fedmoe:a@{secret}@127.0.0.1/none",
        f"postgresql+psycopg://fedmoe:a@b/{secret}@127.0.0.1/none",
        f"postgresql+psycopg://fedmoe:a@b:{secret}@127.0.0.1/none",
    ):
        with pytest.raises((StorageFailedError, DatabaseUrlError)) as refused:
            PostgresJournal(url)
        assert secret not in f"{refused.value!r} {refused.value}"


def test_removed_rows_leave_room_when_the_log_is_forgotten(opened: Opener, url: str) -> None:
    journal = opened()
    fill(journal)
    journal.drop_statistics([stored.id for stored in journal.stored_statistics()])
    journal.forget_log()
    assert journal.statistics() == []
