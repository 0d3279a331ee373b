"""A real coordinator whose gateway lives, killed without warning: no update is lost, no fold is there twice or half."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
import pytest
from crash_load import EXPERTS, Told, kill_under_load, pull, register
from support import EPOCH, LAYOUT, MANIFEST, CoordinatorProcess, make_body, make_flat

from fedmoe.experts import GATEWAY_SEED
from fedmoe.federation.events import (
    Event,
    ExpertRebased,
    ExpertRegistered,
    GatewayMerged,
    UpdateAccepted,
)
from fedmoe.lora.adapter import FloatVector, initial_adapter
from fedmoe.lora.codec import decode
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.experts import GatewayInfo
from fedmoe.wire.contract.messages import UpdateHeader

Start = Callable[..., CoordinatorProcess]
ONLINE = ("--start-from", "gateway", "--merge-after", "3")
#: Registering and three updates are four commits, the fold is the fifth.
PLACES = [
    "fold.computed=1",
    "fold.stored=1",
    "commit.before=5",
    "commit.after=5",
    "commit.published=5",
    "fold.published=1",
]


def events_of(coordinator: CoordinatorProcess) -> list[Event]:
    journal = SqliteJournal(coordinator.state_dir / "journal.sqlite")
    events = list(journal.events())
    journal.close()
    return events


def push_three(url: str) -> None:
    """Updates of one step each; the coordinator may die of the last."""
    with CoordinatorClient(url, attempts=1) as client:
        for number in range(3):
            header = UpdateHeader(
                expert="python", worker="w1", epoch=EPOCH, sequence=number, base_version=number, steps=number + 1
            )
            with suppress(CoordinatorUnavailableError):
                client.push(header, make_body(number))


def gateway_after(url: str, gateway_merges: int) -> GatewayInfo:
    """The gateway once so many merges are done."""
    deadline = time.monotonic() + 30
    with CoordinatorClient(url) as client:
        while True:
            info = client.gateway_info()
            assert info.living is not None
            if info.living.folds >= gateway_merges:
                return info
            assert time.monotonic() < deadline, f"no background merge {gateway_merges} came: {info}"
            time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[GatewayInfo, FloatVector]:
    """Gateway and expert of a run without a kill."""
    coordinator = CoordinatorProcess(tmp_path_factory.mktemp("undisturbed") / "state", arguments=ONLINE)
    coordinator.start()
    try:
        register(coordinator.url, "python")
        push_three(coordinator.url)
        return gateway_after(coordinator.url, 1), pull(coordinator.url, ["python"])["python"]
    finally:
        coordinator.kill()


@pytest.mark.parametrize("place", PLACES)
def test_killed_at_each_step_of_a_merge_it_is_there_once_and_the_same(
    coordinator_process: Start, place: str, undisturbed: tuple[GatewayInfo, FloatVector]
) -> None:
    coordinator = coordinator_process(ONLINE)
    coordinator.start(place)
    register(coordinator.url, "python")
    push_three(coordinator.url)
    assert coordinator.wait() == -signal.SIGKILL
    coordinator.start()
    info = gateway_after(coordinator.url, 1)
    expected, weights = undisturbed
    assert (info.digest, info.version, info.sources) == (expected.digest, expected.version, expected.sources)
    np.testing.assert_array_equal(pull(coordinator.url, ["python"])["python"], weights)
    assert coordinator.stop() == 0
    kinds = [type(event) for event in events_of(coordinator)]
    assert kinds == [ExpertRegistered, *[UpdateAccepted] * 3, GatewayMerged, ExpertRebased]


@pytest.mark.parametrize("keep_updates", [(), ("--keep-updates", "20")])
def test_kill_9_under_load_while_experts_are_merged(coordinator_process: Start, keep_updates: Sequence[str]) -> None:
    check_kills(coordinator_process, 4, keep_updates)


@pytest.mark.slow
def test_a_hundred_kills_under_load_while_experts_are_merged(coordinator_process: Start) -> None:
    check_kills(coordinator_process, 100, ())


def check_kills(start: Start, kills: int, keep_updates: Sequence[str]) -> None:
    coordinator = start([*ONLINE, *keep_updates])
    told = kill_under_load(coordinator, kills, kills, lambda: gateway_after(coordinator.url, 2))
    gateway, before = quiet(coordinator.url), pull(coordinator.url, EXPERTS)
    coordinator.kill()
    coordinator.start()
    assert quiet(coordinator.url) == gateway
    after = pull(coordinator.url, EXPERTS)
    assert coordinator.stop() == 0
    events = events_of(coordinator)
    check_events(events, told)
    assert gateway.living is not None
    assert gateway.living.folds > 1
    expected = rebuilt(coordinator, events, told)
    for name in EXPERTS:
        np.testing.assert_array_equal(before[name], expected[name])
        np.testing.assert_array_equal(after[name], expected[name])


def quiet(url: str) -> GatewayInfo:
    """The gateway once nobody is ready to be merged."""
    deadline = time.monotonic() + 60
    with CoordinatorClient(url) as client:
        while True:
            info = client.gateway_info()
            assert info.living is not None
            if all(left.steps < 3 for left in info.living.departures.values()):
                return info
            assert time.monotonic() < deadline, f"folding does not end: {info}"
            time.sleep(0.01)


def check_events(events: Sequence[Event], told: Told) -> None:
    """Every acknowledged update is there once, versions have no gap, every fold came with all its experts' moves."""
    updates = {(e.worker, e.epoch, e.sequence): e for e in events if isinstance(e, UpdateAccepted)}
    assert updates.keys() == {one.identity for one in told.pushes}
    for one in told.pushes:
        event = updates[one.identity]
        assert (event.version, event.digest) == (one.version, one.digest)
    for name in EXPERTS:
        versions = [e.version for e in events if isinstance(e, UpdateAccepted | ExpertRebased) and e.expert == name]
        assert versions == list(range(1, len(versions) + 1))
    gateway_merges = [event for event in events if isinstance(event, GatewayMerged)]
    assert [fold.number for fold in gateway_merges] == list(range(1, len(gateway_merges) + 1))
    for fold in gateway_merges:
        moved = [e for e in events if isinstance(e, ExpertRebased) and e.gateway == fold.number]
        assert {(e.expert, e.digest) for e in moved} == {(name, fold.digest) for name in fold.sources}


def rebuilt(coordinator: CoordinatorProcess, events: Sequence[Event], told: Told) -> dict[str, FloatVector]:
    """Every expert by the rule in words: what landed since it left the gateway, on the gateway it left."""
    weights = dict.fromkeys(EXPERTS, initial_adapter(LAYOUT, MANIFEST.alpha, GATEWAY_SEED).flat)
    since: dict[str, list[UpdateAccepted]] = {name: [] for name in EXPERTS}
    for event in events:
        if isinstance(event, ExpertRebased):
            file = coordinator.state_dir / "blobs" / event.digest
            # One that nobody goes on from any more may be pruned; a later one takes its place.
            weights[event.expert] = decode(file.read_bytes(), LAYOUT).flat if file.exists() else np.zeros(1, np.float32)
            again = since[event.expert][len(since[event.expert]) - event.again :]
        elif isinstance(event, UpdateAccepted):
            again = [event]
        else:
            continue
        since[event.expert] = again if isinstance(event, ExpertRebased) else [*since[event.expert], event]
        for update in again:
            delta = make_flat(told.seeds[update.worker, update.epoch, update.sequence])
            weights[event.expert] = weights[event.expert] + np.float32(update.coefficient) * delta
    return weights
