"""A coordinator whose journal is in PostgreSQL, as a process: what is local, who may write, a database that crashes."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import forks
import numpy as np
import pytest
from builders import wait_until
from crash_load import EXPERTS, Storage, fold, gather, incarnation_at, pull, read_journal, register, start_pushers
from eras import Eras
from postgres_server import PostgresServer
from support import MANIFEST, CoordinatorProcess, free_port

from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError

pytestmark = pytest.mark.scale

Start = Callable[..., CoordinatorProcess]


@pytest.fixture
def storage(postgres: PostgresServer) -> Storage:
    return Storage(postgres.schema())


def test_only_what_is_local_lies_in_the_folder_and_no_password_anywhere(
    coordinator_process: Start, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server takes any password; the URL comes from the environment, where others cannot read it."""
    assert storage.url is not None
    secret = "correct-horse"
    url = storage.url.replace("fedmoe@", f"fedmoe:{secret}@")
    monkeypatch.setenv("FEDMOE_DATABASE_URL", url)
    coordinator: CoordinatorProcess = coordinator_process()
    coordinator.start()
    register(coordinator.url, *EXPERTS)
    assert coordinator.stop() == 0
    assert "password_on_the_command_line" not in coordinator.log.read_text()
    monkeypatch.delenv("FEDMOE_DATABASE_URL")
    coordinator.arguments = ("--database-url", url)
    coordinator.start()
    assert coordinator.stop() == 0
    assert "password_on_the_command_line" in coordinator.log.read_text()
    files = {path.name for path in coordinator.state_dir.iterdir()}
    assert not [name for name in files if name.startswith("journal")]
    assert files >= {"acknowledged", "audit.jsonl", "blobs"}
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]
    assert len(read_journal(coordinator.state_dir, storage)) == 2


def refusal(state_dir: Path, *arguments: str) -> str:
    """What a start says that is refused with the status for storage."""
    command = ("-m", "fedmoe", "coordinator", "--port", str(free_port()), "--state-dir", str(state_dir), *arguments)
    ended = forks.run(*command, timeout=60)
    assert ended.returncode == 74, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


def test_a_second_coordinator_on_the_same_database_is_refused(
    coordinator_process: Start, storage: Storage, tmp_path: Path
) -> None:
    coordinator: CoordinatorProcess = coordinator_process(storage.arguments)
    coordinator.start()
    assert "in use by another coordinator" in refusal(tmp_path / "other", *storage.arguments)
    register(coordinator.url, "python")


def test_a_folder_and_a_database_that_do_not_belong_together_are_refused(
    coordinator_process: Start, storage: Storage, postgres: PostgresServer
) -> None:
    coordinator: CoordinatorProcess = coordinator_process(storage.arguments)
    coordinator.start()
    register(coordinator.url, "python")
    assert coordinator.stop() == 0
    told = refusal(coordinator.state_dir, "--database-url", postgres.schema())
    assert "it holds 0 events and 1 were acknowledged" in told
    assert "--database-url" in told
    assert "1 were acknowledged" in refusal(coordinator.state_dir)
    assert not list(coordinator.state_dir.glob("journal.sqlite*")), "a start that is refused leaves no journal"
    coordinator.start()


def test_the_coordinator_goes_on_when_the_database_crashes_under_load(
    coordinator_process: Start, storage: Storage, postgres: PostgresServer
) -> None:
    coordinator: CoordinatorProcess = coordinator_process(storage.arguments)
    coordinator.start()
    register(coordinator.url, *EXPERTS)
    eras = Eras(coordinator.state_dir, incarnation_at(coordinator.url), storage)
    stop = threading.Event()
    pushers = start_pushers(coordinator.url, stop, steady=True, timeout=60.0)
    try:
        for crash in range(3):
            wait_until(lambda: min(len(pusher.pushes) for pusher in pushers) >= 3 * (crash + 1), 60)  # noqa: B023
            postgres.stop("immediate")
            time.sleep(0.3 * crash)
            postgres.start()
        wait_until(lambda: min(len(pusher.pushes) for pusher in pushers) >= 12, 60)
    finally:
        stop.set()
        told = gather(pushers)
    weights = pull(coordinator.url, EXPERTS)
    assert coordinator.stop() == 0, "it was the same process all the time"
    assert "database_away" in coordinator.log.read_text()
    assert eras.faults(told) == []
    expected = fold(read_journal(coordinator.state_dir, storage), told.seeds)
    for name in EXPERTS:
        np.testing.assert_array_equal(weights[name], expected[name])


def test_while_the_database_is_away_requests_are_refused_and_the_process_stays(
    coordinator_process: Start, storage: Storage, postgres: PostgresServer
) -> None:
    coordinator: CoordinatorProcess = coordinator_process(storage.arguments)
    coordinator.start()
    postgres.stop("immediate")
    try:
        with (
            CoordinatorClient(coordinator.url, attempts=1, timeout=40.0) as client,
            pytest.raises(CoordinatorUnavailableError, match=r"busy: .* cannot be reached"),
        ):
            client.register("python", "w1", MANIFEST)
        assert coordinator.answers()
    finally:
        postgres.start()
    register(coordinator.url, "python")
    coordinator.kill()
    assert len(read_journal(coordinator.state_dir, storage)) == 1


def test_killed_between_the_rows_and_the_commit_nothing_was_written(
    coordinator_process: Start, storage: Storage
) -> None:
    coordinator: CoordinatorProcess = coordinator_process(storage.arguments)
    coordinator.start()
    assert coordinator.stop() == 0
    coordinator.start("journal.before_commit=1")
    with pytest.raises(CoordinatorUnavailableError):
        register(coordinator.url, "python")
    assert coordinator.wait() == -signal.SIGKILL
    assert len(read_journal(coordinator.state_dir, storage)) == 0
    coordinator.start()
    register(coordinator.url, "python")
