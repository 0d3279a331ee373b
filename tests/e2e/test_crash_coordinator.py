"""A real coordinator process, killed without warning: what it acknowledged is there afterwards, exactly once."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import forks
import numpy as np
import pytest
from crash_campaign import Plan, run
from crash_load import IN_FOLDER, Storage, blob_files, fold, landed, named_blobs, pull, read_journal, register
from postgres_server import PostgresServer
from push_histories import landed_faults
from support import EPOCH, MANIFEST, CoordinatorProcess, make_body, sha256

from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import UpdateHeader, UpdateResult

Start = Callable[..., CoordinatorProcess]


@pytest.fixture(params=["folder", pytest.param("postgres", marks=pytest.mark.scale)])
def storage(request: pytest.FixtureRequest) -> Storage:
    return Storage(request.getfixturevalue("postgres").schema()) if request.param == "postgres" else IN_FOLDER


@pytest.mark.parametrize("keep_updates", [(), ("--keep-updates", "20")])
def test_kill_9_under_load_loses_and_repeats_nothing(tmp_path: Path, keep_updates: Sequence[str]) -> None:
    """7, 54: killed at random moments and places, stopped, with its clock set back and ahead."""
    check_kills(tmp_path, 4, keep_updates)


@pytest.mark.slow
@pytest.mark.parametrize("keep_updates", [(), ("--keep-updates", "20")])
def test_two_hundred_kills_under_load_lose_and_repeat_nothing(tmp_path: Path, keep_updates: Sequence[str]) -> None:
    """Fault 7."""
    check_kills(tmp_path, 100, keep_updates)


@pytest.mark.scale
def test_kill_9_over_postgresql_loses_and_repeats_nothing(tmp_path: Path, postgres: PostgresServer) -> None:
    check_kills(tmp_path, 6, ("--keep-updates", "20"), Storage(postgres.schema()))


def check_kills(folder: Path, kills: int, keep_updates: Sequence[str], storage: Storage = IN_FOLDER) -> None:
    restores = 0.1 if storage.url is None else 0.0  # backups of a database are made by its own programs
    outcome = run(Plan(kills, kills, keep_updates, restores, storage), folder)
    assert outcome.faults == []
    assert len(outcome.told.pushes) > 3 * kills, "hardly any load: the kills prove nothing"
    assert any(one.attempts > 1 for one in outcome.told.pushes), "no push was interrupted: the kills prove nothing"
    state_dir = folder / "state"
    kept = blob_files(state_dir)  # also what kills left unnamed, which waits for a day or lies in the trash
    assert not [file for file in kept if file.startswith("incoming")]
    assert keep_updates or named_blobs(state_dir, storage) <= kept


@dataclass(frozen=True)
class Place:
    """Where the process dies, and what is true by then; registering passes the commit's places once."""

    failpoint: str
    stored: bool
    committed: bool


PLACES = [
    Place("push.received=1", stored=False, committed=False),
    Place("push.checked=1", stored=False, committed=False),
    Place("push.stored=1", stored=True, committed=False),
    Place("commit.before=2", stored=True, committed=False),
    Place("commit.after=2", stored=True, committed=True),
    Place("commit.published=2", stored=True, committed=True),
    Place("push.answered=1", stored=True, committed=True),
]


def push(url: str, sequence: int, base_version: int) -> UpdateResult:
    header = UpdateHeader(expert="python", worker="w1", epoch=EPOCH, sequence=sequence, base_version=base_version)
    with CoordinatorClient(url) as client:
        return client.push(header, make_body(sequence)).result


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.failpoint)
def test_killed_at_each_step_of_a_push_the_retry_is_accepted_once(
    coordinator_process: Start, place: Place, storage: Storage
) -> None:
    """Faults 1, 2, 3."""
    coordinator: CoordinatorProcess = coordinator_process(storage.arguments)
    state_dir, digest = coordinator.state_dir, sha256(make_body(1))
    coordinator.start(place.failpoint)
    register(coordinator.url, "python")
    with pytest.raises(CoordinatorUnavailableError):
        push(coordinator.url, 1, 0)
    assert coordinator.wait() == -signal.SIGKILL
    left = blob_files(state_dir)
    assert (digest in left) == place.stored
    assert len(left) == 1  # the blob, or the upload it was to become
    coordinator.start()
    assert blob_files(state_dir) == ({digest} if place.stored else set())  # unnamed bytes wait for a day
    for duplicate in (place.committed, True):
        result = push(coordinator.url, 1, 0)
        assert (result.version, result.gateway_version, result.duplicate) == (1, 2, duplicate)
    assert push(coordinator.url, 2, 1).version == 2
    weights = pull(coordinator.url, ["python"])
    assert coordinator.stop() == 0
    events = read_journal(state_dir, storage)
    assert [(one.identity[2], one.version) for one in landed(events)] == [(1, 1), (2, 2)]
    assert landed_faults(landed(events)) == []
    seeds = {one.identity: one.identity[2] for one in landed(events)}
    np.testing.assert_array_equal(weights["python"], fold(events, seeds)["python"])


def test_a_kill_while_the_first_expert_is_registered_leaves_a_federation_without_experts(
    coordinator_process: Start,
) -> None:
    coordinator: CoordinatorProcess = coordinator_process()
    coordinator.start("commit.before=1")
    with CoordinatorClient(coordinator.url, attempts=1) as client, pytest.raises(CoordinatorUnavailableError):
        client.register("python", "w1", MANIFEST)
    assert coordinator.wait() == -signal.SIGKILL
    coordinator.start()
    with CoordinatorClient(coordinator.url) as client:
        assert client.list_experts().experts == []
        assert client.register("python", "w1", MANIFEST).version == 0


def test_a_second_coordinator_on_the_same_state_exits_naming_the_first(
    coordinator_process: Start, tmp_path: Path
) -> None:
    """Fault 13."""
    coordinator: CoordinatorProcess = coordinator_process()
    coordinator.start()
    assert coordinator.process is not None
    second = forks.run("-m", "fedmoe", "coordinator", "--port", "0", "--state-dir", str(tmp_path / "state"), timeout=20)
    assert second.returncode != 0
    assert f"process id {coordinator.process.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    register(coordinator.url, "python")  # the first is not disturbed


def test_sigterm_ends_with_status_0_and_everything_is_there_at_the_next_start(coordinator_process: Start) -> None:
    coordinator: CoordinatorProcess = coordinator_process()
    coordinator.start()
    register(coordinator.url, "python")
    push(coordinator.url, 1, 0)
    weights = pull(coordinator.url, ["python"])
    assert coordinator.stop() == 0
    coordinator.start()
    np.testing.assert_array_equal(pull(coordinator.url, ["python"])["python"], weights["python"])
