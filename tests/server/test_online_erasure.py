"""A worker withdraws where experts go on from the gateway (`--start-from gateway`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from crash_house import House
from online_house import ONLINE, gateway, gateway_merges, interrupted_merge
from support import fold, make_body, sha256

from fedmoe.runtime import failpoints
from fedmoe.server.history.verification import verify_state
from fedmoe.server.storage.state_dir import StateDir
from fedmoe.server.upkeep.background_merge import MergeOvertakenError
from fedmoe.wire.contract.messages import ChangeResult, RetractRequest

STAYS = "What 'w1' gave before the expert was rebased as version {} stays in the gateway."


@pytest.fixture
def state(tmp_path: Path) -> StateDir:
    return StateDir.open(tmp_path / "state")


def opened(state: StateDir) -> House:
    house = House.on(state.journal, state.blobs, ONLINE, merges_by_itself=False)
    house.register("python")
    house.register("sql")
    return house


def erase(house: House, worker: str = "w1") -> ChangeResult:
    return asyncio.run(house.service.withdrawals.withdraw(RetractRequest(expert="python", worker=worker, erase=True)))


def push(house: House, seed: int, worker: str) -> str:
    house.push(make_body(seed), seed, worker)
    return sha256(make_body(seed))


def ended(house: House, state: StateDir) -> None:
    """Recovery gives the same, and the state is what was written."""
    house.settle()
    weights = gateway(house).adapter.flat
    for name in ("python", "sql"):
        house.same_after_a_crash(name)
    np.testing.assert_array_equal(gateway(house).adapter.flat, weights)
    house.service.close()
    state.close()
    assert verify_state(state.path).findings == []


def test_before_any_merge_all_of_it_goes(state: StateDir) -> None:
    house = opened(state)
    mine, other = push(house, 1, "w1"), push(house, 2, "w2")
    result = erase(house)
    assert "stays in the gateway" not in result.note
    assert (result.version, mine in set(house.blobs.digests()), other in set(house.blobs.digests())) == (3, False, True)
    house.train(["w2"] * 2)
    assert fold(house.service) == 1
    assert gateway_merges(house)[0].sources == {"python": 5}
    ended(house, state)


def test_what_was_merged_stays_in_the_gateway_and_is_said(state: StateDir) -> None:
    house = opened(state)
    mine = [push(house, seed, worker) for seed, worker in ((1, "w1"), (2, "w2"), (3, "w1"))]
    assert fold(house.service) == 1
    weights = gateway(house).adapter.flat
    result = erase(house)
    assert STAYS.format(4) in result.note
    assert (result.removed, result.version) == (0, 4)
    assert not {mine[0], mine[2]} & set(house.blobs.digests())
    assert mine[1] in set(house.blobs.digests())
    np.testing.assert_array_equal(gateway(house).adapter.flat, weights)
    ended(house, state)


def test_of_what_it_gave_before_and_after_a_merge_only_the_rest_is_taken_out(state: StateDir) -> None:
    house = opened(state)
    mine = [push(house, seed, "w1") for seed in (1, 2, 3)]
    assert fold(house.service) == 1
    mine.append(push(house, 4, "w1"))
    others = push(house, 5, "w2")
    result = erase(house)
    assert result.note.count(STAYS.format(4)) == 1
    assert result.removed == 1
    assert not set(mine) & set(house.blobs.digests())
    house.train(["w2"] * 2)
    assert fold(house.service) == 2
    assert others in set(house.blobs.digests())
    ended(house, state)


def test_what_came_after_a_merge_alone_goes_whole(state: StateDir) -> None:
    """Nothing of the worker was in the expert when it was merged, so nothing is said to stay."""
    house = opened(state)
    for seed in (1, 2, 3):
        push(house, seed, "w2")
    assert fold(house.service) == 1
    mine = push(house, 4, "w1")
    assert "stays in the gateway" not in erase(house).note
    assert mine not in set(house.blobs.digests())
    assert "stays in the gateway" not in erase(house).note  # nor when it is asked for again
    ended(house, state)


def test_a_merge_that_was_computed_with_it_is_dropped(state: StateDir) -> None:
    house = opened(state)
    mine = [push(house, seed, worker) for seed, worker in ((1, "w1"), (2, "w2"), (3, "w2"))]
    with pytest.raises(MergeOvertakenError):
        interrupted_merge(house, lambda: erase(house))
    assert gateway_merges(house) == []
    assert mine[0] not in set(house.blobs.digests())
    ended(house, state)


def test_what_a_merge_had_not_seen_and_landed_once_more_is_taken_out_too(state: StateDir) -> None:
    house = opened(state)
    for seed in (1, 2, 3):
        push(house, seed, "w2")
    late: list[str] = []
    interrupted_merge(house, lambda: late.append(push(house, 4, "w1")))
    assert house.expert().version == 5
    result = erase(house)
    assert (result.removed, result.version, late[0] in set(house.blobs.digests())) == (1, 6, False)
    ended(house, state)


@pytest.mark.parametrize("place", ["erase.wanted", "commit.after", "erase.noted", "erase.blobs_gone"])
@pytest.mark.parametrize("after", [lambda house: None, lambda house: push(house, 4, "w1")])
def test_killed_in_the_middle_the_next_start_does_the_rest(
    state: StateDir, place: str, after: Callable[[House], object]
) -> None:
    house = opened(state)
    mine = [push(house, seed, "w1") for seed in (1, 2, 3)]
    assert fold(house.service) == 1
    if after(house) is not None:
        mine.append(sha256(make_body(4)))

    def reached(name: str) -> None:
        if name == place:
            raise RuntimeError("killed by the test")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(failpoints, "reached", reached)
        with contextlib.suppress(RuntimeError):  # without a retraction there is no commit before the bytes go
            erase(house)
    house.crash()
    house.service.withdrawals.finish()
    house.settle()
    assert not set(mine) & set(house.blobs.digests())
    ended(house, state)
