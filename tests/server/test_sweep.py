"""A coordinator that runs for weeks sweeps as a start does, by a clock that nobody sets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from live import House, open_house, push_headers, push_parameters
from support import LAYOUT, make_body, make_flat, sha256

from fedmoe.config import CoordinatorConfig
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.lora.codec import encode
from fedmoe.server.app import federation_app
from fedmoe.server.storage.blobs import SweepReport, put
from fedmoe.server.upkeep.sweep import DailySweep

DAY = 86_400.0
#: The newest update's time in these tests: a day of 2026.
NOW = 1_790_000_000.0


@dataclass
class Clocks:
    """The machine's clock, and one that only grows."""

    now: float = NOW
    steady: float = 0.0

    def pass_days(self, days: float) -> None:
        self.now += days * DAY
        self.steady += days * DAY


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def house(tmp_path: Path, clocks: Clocks) -> Iterator[House]:
    with open_house(tmp_path) as opened:
        opened.service.committer.clock = lambda: clocks.now
        opened.register("python")
        yield opened


@pytest.fixture
def swept(house: House, clocks: Clocks) -> DailySweep:
    history = house.service._history
    return DailySweep(house.journal, house.blobs, history, lambda: clocks.now, lambda: clocks.steady)


def push(house: House, seed: int) -> str:
    body = make_body(seed)
    with house.client() as client:
        answer = client.post(
            "/push_expert_update", params=push_parameters(seed), content=body, headers=push_headers(body)
        )
    assert answer.status_code == 200, answer.text
    return sha256(body)


def trashed(house: House) -> set[str]:
    return {path.name for path in (house.folder / "trash").rglob("*") if path.is_file()}


def test_it_is_due_once_a_day_whatever_the_machine_s_clock_says(swept: DailySweep, clocks: Clocks) -> None:
    assert not swept.due()
    clocks.now += 400 * DAY
    assert not swept.due()
    clocks.steady += DAY
    assert swept.due()
    swept.sweep()
    assert not swept.due()


def test_what_no_row_names_at_two_sweeps_goes_to_the_trash_and_what_one_names_stays(
    house: House, swept: DailySweep, clocks: Clocks
) -> None:
    update, unnamed = push(house, 1), put(house.blobs, b"of no row")
    snapshot = put(house.blobs, b"a snapshot")
    house.journal.add_snapshot("python", 1, snapshot)
    for wanted in (SweepReport(), SweepReport(to_trash=1), SweepReport()):
        clocks.pass_days(1)
        assert swept.sweep() == wanted
    assert trashed(house) == {unnamed}
    assert {update, snapshot} <= set(house.blobs.digests())


def test_pages_are_read_to_the_end(
    house: House, swept: DailySweep, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.server.storage.journal._PAGE", 2)
    kept = {push(house, seed) for seed in range(1, 6)}
    for _ in range(3):
        clocks.pass_days(1)
        assert swept.sweep() == SweepReport()
    assert kept <= set(house.blobs.digests())


def test_an_update_that_waits_for_an_administrator_stays(house: House, swept: DailySweep, clocks: Clocks) -> None:
    for seed in range(1, 12):
        push(house, seed)
    body = encode(LAYOUT, make_flat(50) * np.float32(1e6))
    with house.client() as client:
        told = push_parameters(50, 11)
        answer = client.post("/push_expert_update", params=told, content=body, headers=push_headers(body))
    assert answer.status_code == 202, answer.text
    for _ in range(3):
        clocks.pass_days(1)
        assert swept.sweep() == SweepReport()
    assert sha256(body) in set(house.blobs.digests())


def again(house: House) -> None:
    put(house.blobs, b"of no row")


def pinned(house: House) -> None:
    writer = house.blobs.writer()
    writer.write(b"of no row")
    house.blobs.pins.add(writer.digest)


def journalled(house: House) -> None:
    house.journal.add_snapshot("python", 1, sha256(b"of no row"))


@pytest.mark.parametrize("meanwhile", [again, pinned, journalled])
def test_bytes_that_somebody_needs_by_now_stay(
    house: House, swept: DailySweep, clocks: Clocks, meanwhile: Callable[[House], None]
) -> None:
    unnamed = put(house.blobs, b"of no row")
    clocks.pass_days(1)
    swept.sweep()
    meanwhile(house)
    clocks.pass_days(1)
    assert swept.sweep() == SweepReport()
    assert unnamed in set(house.blobs.digests())


def test_what_has_been_in_the_trash_for_thirty_days_of_updates_goes_for_good(
    house: House, swept: DailySweep, clocks: Clocks
) -> None:
    push(house, 1)
    unnamed = put(house.blobs, b"of no row")
    for _ in range(2):
        clocks.pass_days(1)
        swept.sweep()
    clocks.pass_days(40)
    assert swept.sweep() == SweepReport()  # nobody trained meanwhile: perhaps it is only the clock that was set
    assert trashed(house) == {unnamed}
    push(house, 2)
    assert swept.sweep() == SweepReport(removed=1)
    assert trashed(house) == set()


def test_a_sweep_that_fails_is_said_and_tried_again_a_day_later(
    house: House, swept: DailySweep, clocks: Clocks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: sa.Executable) -> list[sa.RowMapping]:
        raise OSError("no such disk")

    clocks.pass_days(1)
    with monkeypatch.context() as patched:
        patched.setattr(house.journal, "query", fail)
        assert swept.sweep() == SweepReport()
    assert "sweep_failed" in "".join(capsys.readouterr())
    assert not swept.due()


def test_a_running_coordinator_sweeps_when_it_is_due_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(federation_app, "_TIDY_SECONDS", 0.001)
    running = DistributedCoordinator(CoordinatorConfig(state_dir=str(tmp_path / "state")))
    clocks, sweeps = Clocks(), list[float]()
    blobs, history = running._state.blobs, running.service._history
    sweeper = DailySweep(running._state.journal, blobs, history, lambda: clocks.now, lambda: clocks.steady)
    sweep = sweeper.sweep

    def counted() -> SweepReport:
        sweeps.append(clocks.steady)
        return sweep()

    monkeypatch.setattr(sweeper, "sweep", counted)
    running._federation._sweeping = sweeper

    async def watch() -> None:
        tidying = asyncio.create_task(running._federation._tidy())
        for days in (1.0, 2.0):
            for _ in range(20):
                await asyncio.sleep(0.001)
            assert len(sweeps) == days - 1
            clocks.steady = days * DAY
            while len(sweeps) < days:
                assert not tidying.done(), tidying
                await asyncio.sleep(0.001)
        tidying.cancel()

    asyncio.run(watch())
    running.close()
    assert sweeps == [DAY, 2 * DAY]
