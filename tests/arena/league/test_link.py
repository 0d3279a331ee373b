"""A policy's line to its expert: whatever is killed and when, nothing lands twice and nothing that landed is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from league_sites import House, Road, running_house
from support import LAYOUT, MANIFEST, make_flat

from fedmoe.arena.league.link import ExpertLink, FederationError, PolicySyncPoint
from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.safetensors_bytes import encode_named
from fedmoe.runtime import failpoints
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError

EXPERT = "solver"
#: Where a process may be killed during an exchange, in the order they are reached.
PLACES = ("worker.body_written", "worker.cut", "league.answered", "league.recorded", "worker.settled")


class Killed(BaseException):
    """Stands for SIGKILL: nothing of ours catches it."""


@pytest.fixture(name="house")
def _house(tmp_path: Path) -> Iterator[House]:
    with running_house(tmp_path / "coordinator") as running:
        yield running


@contextmanager
def killed_at(place: str) -> Iterator[None]:
    """Inside, whoever reaches `place` is killed."""

    def reached(name: str) -> None:
        if name == place:
            raise Killed(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failpoints, "reached", reached)
        yield


@dataclass
class Toy:
    """A policy that is only a vector; `checkpoint` and `restart` do what a run does."""

    url: str
    folder: Path
    worker: str = "w1"
    expert: str = EXPERT
    road: Road = field(default_factory=Road)
    saved: tuple[FloatVector, list[str | int]] | None = None

    def start(self) -> Toy:
        self.client = CoordinatorClient(self.url, transport=self.road, attempts=1)
        self.link = ExpertLink(self.folder, self.worker, self.expert, MANIFEST)
        if self.saved is None:
            self.link.register(self.client)
            self.local = self.link.begin(self.client)
        elif self.saved[1] == self.link.mark:
            self.local = self.saved[0]
        else:
            self.local = self.link.newest_local()
        return self

    def checkpoint(self) -> None:
        self.saved = (self.local, self.link.mark)

    def learn(self, numbers: slice, value: float = 1.0) -> None:
        self.local = self.local.copy()
        self.local[numbers] = value

    def exchange(self) -> None:
        self.link.send(self.client, self.local, 1, lambda error: None)
        while not self.link.wait(0.01) and not self.road.closed:
            pass
        newest = self.link.take_in(self.local)
        self.local = self.local if newest is None else newest

    def refresh(self) -> None:
        newest = self.link.refresh(self.client, self.local)
        self.local = self.local if newest is None else newest

    def end(self) -> None:
        self.link.close()
        self.client.close()

    def restart(self) -> None:
        self.end()
        self.start()


def test_an_update_is_the_difference_to_what_was_downloaded_bit_for_bit(house: House, tmp_path: Path) -> None:
    toy = Toy(house.url, tmp_path / "w1").start()
    first = toy.local
    toy.local = first + make_flat(3)
    learned = toy.local
    toy.exchange()
    (update,) = house.updates()
    np.testing.assert_array_equal(house.delta(update), learned - first)
    np.testing.assert_array_equal(house.weights(EXPERT), first + (learned - first))
    assert update.info["steps"] == 1
    np.testing.assert_array_equal(toy.local, learned)  # nobody else changed it: not touched, not even rounded
    toy.end()


def test_what_rounding_left_over_is_no_update(house: House, tmp_path: Path) -> None:
    toy = Toy(house.url, tmp_path / "w1").start()
    toy.local = toy.local * np.float32(1 + 1e-7)
    assert not toy.link.send(toy.client, toy.local, 1, lambda error: None)
    assert house.version(EXPERT) == 0
    toy.end()


@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_in_an_exchange_an_update_lands_once(place: str, house: House, tmp_path: Path) -> None:
    toy = Toy(house.url, tmp_path / "w1").start()
    before = toy.local
    toy.checkpoint()
    toy.learn(slice(0, 5))
    learned = toy.local
    with killed_at(place), pytest.raises(Killed):
        toy.exchange()
    toy.restart()
    toy.learn(slice(0, 5))  # the run repeats the iteration that the checkpoint did not know
    toy.exchange()
    toy.exchange()
    assert [update.sequence for update in house.updates()] == [0]
    np.testing.assert_array_equal(house.weights(EXPERT), before + (learned - before))
    np.testing.assert_allclose(toy.local, learned, atol=1e-6)
    toy.end()


def test_an_answer_that_was_lost_is_asked_for_again_and_nothing_lands_twice(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.wire.delivery._FIRST_PAUSE", 0.01)
    toy = Toy(house.url, tmp_path / "w1").start()
    toy.road.lose = 2
    toy.learn(slice(0, 5))
    toy.exchange()
    assert (house.version(EXPERT), toy.road.requests.count("/push_expert_update")) == (1, 3)
    np.testing.assert_allclose(house.weights(EXPERT), toy.local, atol=1e-6)
    toy.end()


def test_what_was_learned_while_an_update_was_under_way_travels_with_the_next(house: House, tmp_path: Path) -> None:
    toy = Toy(house.url, tmp_path / "w1").start()
    toy.road.closed = True
    toy.learn(slice(0, 5))
    toy.exchange()
    toy.learn(slice(5, 9))
    toy.checkpoint()
    toy.restart()  # killed while the coordinator is away
    toy.road.closed = False
    toy.exchange()
    toy.exchange()
    assert house.version(EXPERT) == 2
    np.testing.assert_allclose(house.weights(EXPERT)[:9], 1, atol=1e-6)
    np.testing.assert_allclose(house.weights(EXPERT), toy.local, atol=1e-6)
    toy.end()


def test_of_two_on_one_expert_each_goes_on_from_what_both_have_learned(house: House, tmp_path: Path) -> None:
    one, other = (Toy(house.url, tmp_path / name, name).start() for name in ("w1", "w2"))
    start = one.local
    np.testing.assert_array_equal(start, other.local)
    one.local, other.local = one.local + make_flat(1), other.local + make_flat(2)
    one.exchange()
    other.exchange()
    one.refresh()
    first, second = house.updates()
    np.testing.assert_allclose([first.coefficient, second.coefficient], [1.0, 2**-0.5])
    summed = start + house.delta(first) + np.float32(second.coefficient) * house.delta(second)
    for weights in (house.weights(EXPERT), one.local, other.local):
        np.testing.assert_allclose(weights, summed, atol=1e-6)
    one.end()
    other.end()


def test_an_update_that_is_too_old_is_moved_onto_the_newest_version(tmp_path: Path) -> None:
    with running_house(tmp_path / "coordinator", max_staleness=0) as house:
        one, other = (Toy(house.url, tmp_path / name, name).start() for name in ("w1", "w2"))
        one.learn(slice(0, 5))
        one.exchange()
        other.learn(slice(5, 9))
        other.exchange()
        assert house.version(EXPERT) == 1
        np.testing.assert_allclose(other.local[:9], 1, atol=1e-6)
        other.exchange()
        assert house.version(EXPERT) == 2
        np.testing.assert_allclose(house.weights(EXPERT)[:9], 1, atol=1e-6)
        one.end()
        other.end()


def test_a_damaged_point_is_refused_by_name(house: House, tmp_path: Path) -> None:
    toy = Toy(house.url, tmp_path / "w1").start()
    toy.end()
    file = tmp_path / "w1" / "point.safetensors"
    for damaged in (file.read_bytes()[:-1], b"", PolicySyncPoint(make_flat(1)[:3], make_flat(1)[:3], 0).encoded()):
        file.write_bytes(damaged)
        with pytest.raises(FederationError, match=r"point\.safetensors cannot be read"):
            ExpertLink(tmp_path / "w1", "w1", EXPERT, MANIFEST)


def test_without_a_coordinator_there_is_no_beginning(tmp_path: Path) -> None:
    toy = Toy("http://127.0.0.1:9", tmp_path / "w1")
    with pytest.raises(CoordinatorUnavailableError):
        toy.start()
    toy.end()


@given(st.integers(0, 99), st.integers(-1, 99), st.integers(0, 99))
def test_a_point_is_read_back_bit_for_bit(version: int, answered: int, count: int) -> None:
    point = PolicySyncPoint(make_flat(version), make_flat(count), version, answered, count)
    read = PolicySyncPoint.decoded(point.encoded(), LAYOUT.size)
    np.testing.assert_array_equal([read.base, read.local], [point.base, point.local])
    assert (read.version, read.answered, read.count) == (version, answered, count)


OPERATIONS: dict[str, Callable[[Toy], None]] = {
    "checkpoint": Toy.checkpoint,
    "exchange": Toy.exchange,
    "restart": Toy.restart,
    "away": lambda toy: setattr(toy.road, "closed", True),
    "back": lambda toy: setattr(toy.road, "closed", False),
}


def test_what_was_learned_lands_once_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sites learn different numbers of one expert; each learned number is 1 in the end, never 2, nor 0 again."""
    monkeypatch.setattr("fedmoe.wire.delivery._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("fedmoe.wire.delivery._LONGEST_PAUSE", 0.01)
    experts = (f"expert-{number}" for number in count())

    @settings(max_examples=15, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 1), st.sampled_from(["learn", "learn", *OPERATIONS, *PLACES])), max_size=25)
    )
    def law(operations: list[tuple[int, str]]) -> None:
        expert = next(experts)
        toys = [Toy(house.url, tmp_path / expert / worker, worker, expert).start() for worker in ("w1", "w2")]
        _play(house, toys, operations)
        for toy in toys:
            toy.end()

    with running_house(tmp_path / "coordinator", staleness="constant") as house:
        law()


def _play(house: House, toys: list[Toy], operations: list[tuple[int, str]]) -> None:
    start, landed, learned = toys[0].local, frozenset[int](), [0, 0]
    for toy in toys:
        toy.checkpoint()
    for which, operation in operations:
        toy = toys[which]
        if operation == "learn":
            number = which + 2 * learned[which]
            toy.learn(slice(number, number + 1), float(start[number]) + 1)
            learned[which] = (learned[which] + 1) % (LAYOUT.size // 2)
        elif operation in PLACES:
            _exchange_and_be_killed(toy, operation)
        else:
            OPERATIONS[operation](toy)
        landed = _landed(house, toy.expert, start, landed)
    _settle(toys)
    _landed(house, toys[0].expert, start, landed)
    for toy in toys:
        np.testing.assert_allclose(toy.local, house.weights(toy.expert), atol=1e-5)


def _exchange_and_be_killed(toy: Toy, place: str) -> None:
    with killed_at(place):
        try:
            toy.exchange()
        except Killed:
            toy.restart()


def _landed(house: House, expert: str, start: FloatVector, before: frozenset[int]) -> frozenset[int]:
    """Which numbers of the expert are learned; each was learned not at all or once, and stays."""
    change = house.weights(expert) - start
    np.testing.assert_allclose(change, np.rint(change), atol=1e-5)
    assert set(np.rint(change).tolist()) <= {0.0, 1.0}
    landed = frozenset(np.flatnonzero(np.rint(change)).tolist())
    assert before <= landed
    return landed


def _settle(toys: list[Toy]) -> None:
    for toy in toys:
        toy.road.closed = False
        toy.restart()
    for _ in range(3):
        for toy in toys:
            toy.exchange()
            if toy.link.wait(0):
                toy.refresh()


def test_what_was_made_in_a_lost_history_is_moved_onto_the_one_there_is(tmp_path: Path) -> None:
    """The coordinator's state is lost, and another site's update has the number that this one's base had."""
    with running_house(tmp_path / "lost") as lost:
        toy = Toy(lost.url, tmp_path / "w1").start()
        toy.learn(slice(0, 5))
        toy.exchange()
        toy.end()
    with running_house(tmp_path / "new") as house:
        other = Toy(house.url, tmp_path / "w2", "w2").start()
        other.learn(slice(10, 15))
        other.exchange()
        toy.url = house.url
        toy.start().learn(slice(5, 9))
        toy.exchange()
        assert [update.worker for update in house.updates()] == ["w2"], "it was made from version 1 of the lost history"
        toy.exchange()
        assert [(update.worker, update.base_version) for update in house.updates()] == [("w2", 0), ("w1", 1)]
        np.testing.assert_allclose(house.weights(EXPERT)[5:9], 1, atol=1e-6)
        np.testing.assert_allclose(house.weights(EXPERT)[10:15], 1, atol=1e-6)
        np.testing.assert_allclose(house.weights(EXPERT), toy.local, atol=1e-6)
        toy.end()
        other.end()


@pytest.mark.parametrize("place", [0.0, 0.001, 0.3, 0.7, 1.0])
def test_a_flipped_bit_in_a_point_is_named_and_never_learned_from(place: float) -> None:
    data = bytearray(PolicySyncPoint(make_flat(1), make_flat(2), 3, 4, 5).encoded())
    data[int(place * (len(data) - 1))] ^= 4
    with pytest.raises(ValueError):
        PolicySyncPoint.decoded(bytes(data), LAYOUT.size)


def test_a_point_of_an_older_version_has_no_checksum_and_is_read() -> None:
    counts = '{"version": 3, "answered": 4, "count": 5}'
    old = encode_named({"base": make_flat(1), "local": make_flat(2)}, {"fedmoe": counts})
    read = PolicySyncPoint.decoded(old, LAYOUT.size)
    assert (read.version, read.answered, read.count) == (3, 4, 5)
