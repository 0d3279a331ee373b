from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import structlog
from live import ADMIN, JOIN
from starlette.testclient import TestClient

from fedmoe.config import CoordinatorConfig
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.tokens import TokenGate
from fedmoe.server.storage.records import TokenRecord
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.wire.http.bearer import hash_token, new_token

DAY = 86_400.0


class Clock:
    """A machine's clock, to be set, and seconds that nobody sets."""

    def __init__(self) -> None:
        self.wall, self.passed = 1_000_000.0, 50.0

    def tick(self, seconds: float) -> None:
        self.wall += seconds
        self.passed += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate_of(tmp_path: Path, clock: Clock) -> Iterator[Callable[[], TokenGate]]:
    """Opens the gate on one journal again and again, as starts of a coordinator do."""
    opened: list[SqliteJournal] = []

    def open_again() -> TokenGate:
        while opened:
            opened.pop().close()
        opened.append(SqliteJournal(tmp_path / "journal.sqlite"))
        return TokenGate(opened[0], True, lambda: clock.wall, lambda: clock.passed)

    yield open_again
    opened.pop().close()


def admitted(gate: TokenGate, token: str) -> bool:
    try:
        return gate.admit(f"Bearer {token}").role != ""
    except RefusedError:
        return False


def test_another_token_of_the_environment_revokes_the_one_before_and_no_other(gate_of: Callable[[], TokenGate]) -> None:
    first, second, made = new_token(), new_token(), new_token()
    gate = gate_of()
    assert gate.adopt({"join": first, "admin": ADMIN}) == []
    gate.add(made, "join")
    gate = gate_of()
    replaced = gate.adopt({"join": second, "admin": ADMIN})
    assert [record.hash for record in replaced] == [hash_token(first)]
    for opened in (gate, gate_of()):
        assert [admitted(opened, token) for token in (first, second, made, ADMIN)] == [False, True, True, True]


def test_a_token_whose_row_was_left_out_stays_out_and_nobody_comes_in_without_one(
    gate_of: Callable[[], TokenGate], tmp_path: Path
) -> None:
    given, made = new_token(), new_token()
    gate = gate_of()
    gate.adopt({"join": given})
    gate.add(made, "worker")
    gate_of()  # closes the one before
    with closing(sqlite3.connect(tmp_path / "journal.sqlite")) as connection:
        connection.execute("DELETE FROM tokens")
        connection.commit()
    journal = SqliteJournal(tmp_path / "journal.sqlite", skip_damaged=True)
    journal.close()
    gate = gate_of()
    assert gate.ever_had_tokens
    assert not admitted(gate, made)
    with pytest.raises(RefusedError, match="damaged in the journal"):
        gate.adopt({"join": given})
    other = new_token()
    gate.adopt({"join": other})
    assert admitted(gate, other)


def test_a_start_without_a_token_of_the_environment_keeps_the_one_before(gate_of: Callable[[], TokenGate]) -> None:
    gate_of().adopt({"join": JOIN})
    gate = gate_of()
    assert gate.adopt({}) == []
    assert admitted(gate, JOIN)


@pytest.mark.parametrize("origin", ["start", "older program"])
def test_a_token_that_comes_from_the_environment_later_is_replaced_like_any_other(
    gate_of: Callable[[], TokenGate], origin: str, tmp_path: Path
) -> None:
    gate = gate_of()
    if origin == "start":
        gate.add(JOIN, "join", origin="start")
    else:
        gate._journal.put_token(TokenRecord(hash_token(JOIN), "join"))
        gate = gate_of()
    gate.adopt({"join": JOIN})
    gate = gate_of()
    gate.adopt({"join": new_token()})
    assert not admitted(gate, JOIN)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"join": "revoked-token-of-32-characters-0"}, "was revoked. Give another one"),
        ({"join": "short-token-of-32-characters-000"}, "has expired"),
        ({"join": "worker-token-of-32-characters-00"}, "known here as a token with other rights"),
        ({"join": ADMIN}, "known here as a token with other rights \\(admin\\)"),
        ({"admin": JOIN}, "known here as a token with other rights \\(join\\)"),
        ({"join": "another-token-of-32-characters-0", "admin": JOIN}, "other rights"),
    ],
)
def test_a_given_token_that_is_known_as_something_else_is_refused_in_words_and_changes_nothing(
    gate_of: Callable[[], TokenGate], clock: Clock, given: dict[str, str], words: str
) -> None:
    gate = gate_of()
    gate.adopt({"join": JOIN, "admin": ADMIN})
    gate.revoke(gate.add("revoked-token-of-32-characters-0", "join").hash)
    gate.add("short-token-of-32-characters-000", "join", expires_in=1.0)
    gate.add("worker-token-of-32-characters-00", "worker", "w1")
    clock.tick(2)
    before = gate._journal.tokens()
    with pytest.raises(RefusedError, match=words):
        gate.adopt(given)
    assert gate._journal.tokens() == before
    assert admitted(gate, JOIN)


def test_an_expired_token_stays_expired_when_the_clock_is_set_back_54(
    gate_of: Callable[[], TokenGate], clock: Clock
) -> None:
    gate = gate_of()
    token = new_token()
    gate.add(token, "join", expires_in=60.0)
    clock.tick(61)
    assert not admitted(gate, token)
    clock.wall -= DAY
    assert not admitted(gate, token)
    assert gate.clock.behind == pytest.approx(DAY)
    clock.wall += DAY
    assert gate.keeping_is_due, "the end of a token is made durable at once"
    gate.keep()
    assert not gate.keeping_is_due
    clock.wall -= DAY
    assert not admitted(gate_of(), token), "and so it stays expired for the next process"


def test_an_end_is_durable_even_if_nobody_asked_and_nothing_was_kept_before_54(
    gate_of: Callable[[], TokenGate], clock: Clock
) -> None:
    """The coordinator was stopped before the end, and started after it."""
    token = new_token()
    gate_of().add(token, "join", expires_in=60.0)
    clock.tick(3600)
    gate = gate_of()
    assert gate.keeping_is_due
    gate.keep()
    clock.wall -= DAY
    assert not admitted(gate_of(), token)


def test_behind_a_clock_that_was_set_back_tokens_still_end_54(gate_of: Callable[[], TokenGate], clock: Clock) -> None:
    gate = gate_of()
    first, second = new_token(), new_token()
    gate.add(first, "join", expires_in=60.0)
    clock.wall -= DAY
    gate.add(second, "join", expires_in=60.0)
    assert admitted(gate, first)
    assert admitted(gate, second)
    clock.tick(61)
    assert not admitted(gate, first)
    assert not admitted(gate, second)


def test_a_jump_a_day_ahead_ends_nothing_that_ends_later_54(gate_of: Callable[[], TokenGate], clock: Clock) -> None:
    gate = gate_of()
    short, long = new_token(), new_token()
    gate.add(short, "join", expires_in=60.0)
    gate.add(long, "join", expires_in=2 * DAY)
    clock.wall += DAY
    assert (admitted(gate, short), admitted(gate, long)) == (False, True)
    clock.wall -= DAY
    assert (admitted(gate, short), admitted(gate, long)) == (False, True)


def test_last_uses_cost_no_write_and_are_kept_from_time_to_time(
    gate_of: Callable[[], TokenGate], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = gate_of()
    gate.add(JOIN, "join", label="site A")
    gate.keep()
    writes: list[object] = []
    monkeypatch.setattr(gate._journal, "_write_locked", lambda *given: writes.append(given))
    for _ in range(100):
        gate.admit(f"Bearer {JOIN}", "10.0.0.7")
    assert writes == []
    assert not gate.keeping_is_due
    clock.tick(61)
    assert gate.keeping_is_due
    monkeypatch.undo()
    gate.keep()
    (known,) = gate_of().listed()
    assert (known.label, known.used_at, known.used_from) == ("site A", 1_000_000.0, "10.0.0.7")
    assert (known.made_at, known.usable) == (1_000_000.0, True)


def test_whoever_is_refused_learns_the_coordinators_time_53(gate_of: Callable[[], TokenGate], clock: Clock) -> None:
    with pytest.raises(RefusedError) as refused:
        gate_of().admit("Bearer nobody-knows-this-token")
    assert refused.value.facts == {"coordinator_time": clock.wall}


def started(folder: Path, **parameters: object) -> DistributedCoordinator:
    """A coordinator that was opened and closed again."""
    config = CoordinatorConfig(state_dir=str(folder / "state"), **parameters)  # type: ignore[arg-type]
    coordinator = DistributedCoordinator(config)
    coordinator.service.start()
    coordinator.close()
    return coordinator


@pytest.mark.parametrize("first", [{"host": "0.0.0.0"}, {"token": JOIN, "admin_token": ADMIN}])
def test_where_there_ever_were_tokens_loopback_asks_for_them_too(tmp_path: Path, first: dict[str, object]) -> None:
    started(tmp_path, **first)
    again = started(tmp_path)
    assert again.gate.required
    assert again.new_tokens == {}
    with TestClient(again.app, base_url="http://127.0.0.1") as client:
        assert client.get("/list_experts").status_code == 401


def test_where_all_tokens_were_revoked_a_start_makes_new_ones_instead_of_opening(tmp_path: Path) -> None:
    first = started(tmp_path, host="0.0.0.0")
    journal = SqliteJournal(tmp_path / "state" / "journal.sqlite")
    gate = TokenGate(journal, True, lambda: 0.0)
    for token in first.new_tokens.values():
        gate.revoke(hash_token(token))
    journal.close()
    again = started(tmp_path)
    assert again.gate.required
    assert set(again.new_tokens) == {"join", "admin"}
    assert not set(again.new_tokens.values()) & set(first.new_tokens.values())


def test_insecure_is_said_in_the_log_with_the_tokens_it_ignores(tmp_path: Path) -> None:
    started(tmp_path, host="0.0.0.0")
    with structlog.testing.capture_logs() as told:
        again = started(tmp_path, insecure=True)
    assert not again.gate.required
    (line,) = [line for line in told if line["event"] == "insecure"]
    assert (line["log_level"], line["tokens_not_asked_for"]) == ("warning", 2)
