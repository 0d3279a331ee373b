"""What workers tell: bounded, paged, and read by those it is of."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import ADMIN, JOIN, House, open_house
from starlette.testclient import TestClient

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.security import Principal
from fedmoe.server.statistics.reported_statistics import PAGE_BYTES, ReportedStatistics, StatisticLimits
from fedmoe.server.storage.records import Statistic
from fedmoe.server.storage.sqlite_journal import SqliteJournal

ANYBODY = Principal("admin")


def held_out(step: int, loss: float, worker: str = "w1", expert: str = "python", at: float = 0.0) -> Statistic:
    values = {"step": step, "loss": loss, "first": 3.0, "best": 1.0, "tokens": 100}
    return Statistic(expert, worker, "held_out", values, at)


def note(value: float, worker: str = "w1", expert: str = "python", at: float = 0.0, keys: int = 1) -> Statistic:
    return Statistic(expert, worker, "note", {f"key_{key}": value for key in range(keys)}, at)


@pytest.fixture
def journal() -> Iterator[SqliteJournal]:
    journal = SqliteJournal(None)
    yield journal
    journal.close()


def steps(told: ReportedStatistics) -> list[Any]:
    return [row.statistic.payload["step"] for row in told.page(ANYBODY)[0]]


def test_held_out_losses_thin_out_with_age_but_the_best_and_the_newest_stay_57(journal: SqliteJournal) -> None:
    limits = StatisticLimits(held_out=16)
    told = ReportedStatistics(journal, limits)
    for step in range(500):
        told.add(held_out(step, 0.5 if step == 101 else 2.0))
    kept = steps(told)
    assert len(kept) <= 16
    assert {101, 499} <= set(kept)
    assert min(kept) < 200  # the curve still shows how it began
    assert kept == sorted(kept)
    assert steps(ReportedStatistics(journal, limits)) == kept
    assert len(journal.statistics()) == len(kept)


def test_too_much_within_an_hour_is_refused_and_later_the_oldest_make_room_57(journal: SqliteJournal) -> None:
    told = ReportedStatistics(journal, StatisticLimits(rows=5, own=10_000, seconds=60.0))
    for number in range(5):
        told.add(note(number, at=float(number)))
    with pytest.raises(RefusedError, match="sent 5 statistics of python") as refused:
        told.add(note(5, at=59.0))
    assert refused.value.code == "too_many_statistics"
    told.add(held_out(1, 2.0, at=59.0))
    told.add(note(1, worker="w2", at=59.0))
    told.add(note(6, at=61.0))
    assert [row.statistic.payload.get("key_0") for row in told.page(ANYBODY, worker="w1", kind="note")[0]] == [
        1,
        2,
        3,
        4,
        6,
    ]
    told.add(note(7, worker="w3", keys=400, at=62.0))
    with pytest.raises(RefusedError, match="at most 5 and 10000 bytes"):
        told.add(note(8, worker="w3", keys=400, at=62.0))
    assert len(told.page(ANYBODY, worker="w3")[0]) == 1


def test_a_statistic_that_is_too_large_is_refused(journal: SqliteJournal) -> None:
    with pytest.raises(RefusedError, match="at most 65536 are kept in one") as refused:
        ReportedStatistics(journal).add(note(1.0, keys=4000))
    assert refused.value.code == "too_large"
    assert journal.statistics() == []


def test_whoever_told_the_most_makes_room_when_all_together_is_too_much(journal: SqliteJournal) -> None:
    limits = StatisticLimits(expert=20_000, whole=30_000)
    told = ReportedStatistics(journal, limits)
    told.add(note(0, worker="honest"))
    for number in range(30):
        told.add(note(number, worker="greedy"))
    kept = [row.statistic.worker for row in told.page(ANYBODY)[0]]
    assert kept.count("honest") == 1
    assert kept.count("greedy") > 20
    for number in range(30):
        told.add(note(number, worker="greedy", expert=f"other-{number % 3}"))
    assert "honest" in [row.statistic.worker for row in told.page(ANYBODY)[0]]
    assert len(journal.statistics()) < 60
    assert (
        len(told.page(ANYBODY)[0])
        == len(journal.statistics())
        == len(ReportedStatistics(journal, limits).page(ANYBODY)[0])
    )


def test_what_a_journal_of_before_has_too_much_of_goes_at_the_start(journal: SqliteJournal) -> None:
    for step in range(300):
        journal.add_statistic(held_out(step, 2.0))
    told = ReportedStatistics(journal, StatisticLimits(whole=50_000))
    assert len(told.page(ANYBODY)[0]) == len(journal.statistics()) < 100


def test_pages_are_stable_while_others_write_and_bounded_in_bytes(journal: SqliteJournal) -> None:
    told = ReportedStatistics(journal, StatisticLimits(own=16 << 20))
    for number in range(40):
        told.add(note(number, keys=3000))
    seen: list[object] = []
    after: int | None = 0
    while after is not None:
        rows, after = told.page(ANYBODY, after=after, limit=7)
        assert sum(row.size for row in rows) <= PAGE_BYTES
        seen += [row.statistic.payload["key_0"] for row in rows]
        told.add(note(100.0, worker="w2"))
    assert seen[:40] == list(range(40))
    rows, after = told.page(ANYBODY)
    assert (len(rows) < 40, after) == (True, rows[-1].id)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[House]:
    with open_house(tmp_path, tokens=True) as house:
        house.register("ea", "eb")
        for number, (expert, worker) in enumerate([("ea", "wa"), ("eb", "wb"), ("ea", "wb"), ("eb", "wa")]):
            house.service.reported.add(Statistic(expert, worker, "k", {"n": number}, 1.0))
        yield house


def rows(client: TestClient, **parameters: object) -> list[tuple[str, str]]:
    answer = client.get("/statistics", params=parameters)  # type: ignore[arg-type]
    assert answer.status_code == 200, answer.text
    return [(row["expert"], row["worker"]) for row in answer.json()]


def test_a_workers_token_reads_its_own_rows_of_its_experts_52(guarded: House) -> None:
    with guarded.client(ADMIN) as admin:
        wanted = {"role": "worker", "worker": "wa", "experts": ["ea"]}
        token = admin.post("/tokens", json=wanted).json()["token"]
        assert len(rows(admin)) == 4
    with guarded.client(token) as client:
        assert rows(client) == rows(client, expert="ea") == [("ea", "wa")]
        for others in ({"expert": "eb"}, {"worker": "wb"}):
            assert client.get("/statistics", params=others).json()["code"] == "forbidden"
    with guarded.client(JOIN) as client:
        assert rows(client, worker="wb") == [("eb", "wb"), ("ea", "wb")]


def test_a_page_says_where_the_next_one_begins(guarded: House) -> None:
    with guarded.client(JOIN) as client:
        first = client.get("/statistics", params={"limit": 3})
        following = first.headers["fedmoe-next"]
        last = client.get("/statistics", params={"limit": 3, "after": following})
        assert "fedmoe-next" not in last.headers
        assert [row["values"]["n"] for row in first.json() + last.json()] == [0, 1, 2, 3]
        assert client.get("/statistics", params={"limit": 1001}).status_code == 422


def test_more_than_is_kept_is_429_with_a_time_to_come_back(guarded: House) -> None:
    told = {"expert": "ea", "worker": "wa", "kind": "k", "values": {f"key_{i}": 1 / (i + 3) for i in range(256)}}
    with guarded.client(JOIN) as client:
        codes = [client.post("/push_statistics", json=told).status_code for _ in range(60)]
        assert 10 < codes.count(204) < 60
        assert set(codes) == {204, 429}
        refused = client.post("/push_statistics", json=told)
        assert (refused.json()["code"], refused.headers["retry-after"]) == ("too_many_statistics", "600")
