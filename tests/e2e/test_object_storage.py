"""A real coordinator process with its blobs in a real S3 server: killed, cut off, and full of large bodies."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from crash_campaign import Plan, run
from crash_load import IN_FOLDER, Storage, fold, landed, pull, read_journal, register
from push_histories import landed_faults
from s3_server import Way
from support import EPOCH, LAYOUT, MANIFEST, CoordinatorProcess, make_body, sha256

from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.server.history.verification import check_start, verify_state
from fedmoe.server.storage.backup import make_backup
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.bucket import Bucket
from fedmoe.server.storage.restore import restore
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import UpdateHeader, UpdateResult

pytestmark = pytest.mark.scale

Start = Callable[..., CoordinatorProcess]
#: Rank 16 on all linear layers of SmolLM2-135M has about so many parameters: 19.6 MB in float32.
REAL = Layout((ModuleShape("m", 206_250, 100_000),), 16)


def digests(url: str) -> set[str]:
    return {facts.key.removeprefix("blobs/") for facts in Bucket(url).list("blobs")}


def push(url: str, sequence: int, base_version: int, layout: Layout, attempts: int = 5) -> UpdateResult:
    header = UpdateHeader(expert="python", worker="w1", epoch=EPOCH, sequence=sequence, base_version=base_version)
    with CoordinatorClient(url, attempts=attempts) as client:
        return client.push(header, make_body(sequence, layout)).result


def register_with(url: str, layout: Layout) -> None:
    with CoordinatorClient(url) as client:
        client.register("python", "w1", replace(MANIFEST, layout=layout))


@pytest.mark.parametrize("layout", [LAYOUT, REAL], ids=["tiny", "real"])
@pytest.mark.parametrize(
    ("place", "stored", "committed"),
    [
        ("push.received=1", False, False),
        ("push.checked=1", False, False),
        ("push.stored=1", True, False),
        ("commit.before=2", True, False),
        ("commit.after=2", True, True),
        ("commit.published=2", True, True),
        ("push.answered=1", True, True),
    ],
)
def test_killed_at_each_step_of_a_push_the_retry_is_accepted_once(
    coordinator_process: Start, bucket_url: str, layout: Layout, place: str, stored: bool, committed: bool
) -> None:
    """Faults 1, 2, 3 with an object store: what nobody journalled stays there, and the same bits are served again."""
    coordinator = coordinator_process(["--blobs", bucket_url])
    digest = sha256(make_body(1, layout))
    coordinator.start(place)
    register_with(coordinator.url, layout)
    with pytest.raises(CoordinatorUnavailableError):
        push(coordinator.url, 1, 0, layout, attempts=1)
    assert coordinator.wait() == -signal.SIGKILL
    assert digests(bucket_url) == ({digest} if stored else set())
    coordinator.start()
    assert not any(path.is_file() for path in (coordinator.state_dir / "blobs").rglob("*"))
    for duplicate in (committed, True):
        result = push(coordinator.url, 1, 0, layout)
        assert (result.version, result.duplicate) == (1, duplicate)
    assert push(coordinator.url, 2, 1, layout).version == 2
    weights = pull(coordinator.url, ["python"])["python"]
    coordinator.kill()
    coordinator.start()
    np.testing.assert_array_equal(pull(coordinator.url, ["python"])["python"], weights)
    assert coordinator.stop() == 0
    events = read_journal(coordinator.state_dir)
    assert [(one.identity[2], one.version) for one in landed(events)] == [(1, 1), (2, 2)]
    assert landed_faults(landed(events)) == []
    if layout is LAYOUT:
        np.testing.assert_array_equal(
            weights, fold(events, {one.identity: one.identity[2] for one in landed(events)})["python"]
        )


@pytest.mark.parametrize("journal", ["sqlite", "postgres"])
def test_kill_9_under_load_loses_and_repeats_nothing(
    tmp_path: Path, bucket_url: str, journal: str, request: pytest.FixtureRequest
) -> None:
    """Faults 7, 54 with an object store: snapshots, pruning, and with SQLite backups and restores too."""
    sqlite = journal == "sqlite"
    storage = IN_FOLDER if sqlite else Storage(request.getfixturevalue("postgres").schema())
    arguments = ("--blobs", bucket_url, "--keep-updates", "20")
    outcome = run(Plan(6, 6, arguments, 0.1 if sqlite else 0.0, storage), tmp_path)
    assert outcome.faults == []
    assert len(outcome.told.pushes) > 18, "hardly any load: the kills prove nothing"
    assert any(one.attempts > 1 for one in outcome.told.pushes), "no push was interrupted: the kills prove nothing"


def test_while_its_store_is_gone_pushes_wait_and_pulls_go_on(
    coordinator_process: Start, bucket_url: str, way: Way
) -> None:
    """Fault 9 of an object store: it may be well again, so the process lives."""
    coordinator = coordinator_process(["--blobs", bucket_url])
    coordinator.start()
    register(coordinator.url, "python")
    assert push(coordinator.url, 1, 0, LAYOUT).version == 1
    way.close()
    with pytest.raises(CoordinatorUnavailableError, match="blobs_unavailable") as refused:
        push(coordinator.url, 2, 1, LAYOUT, attempts=1)
    assert refused.value.retry_after == 5
    assert pull(coordinator.url, ["python"])["python"].size == LAYOUT.size
    way.open()
    result = push(coordinator.url, 2, 1, LAYOUT)
    assert (result.version, result.duplicate) == (2, False)
    coordinator.kill()
    way.close()
    with pytest.raises(AssertionError, match="blobs_unavailable"):
        coordinator.start()
    way.open()
    coordinator.start()
    assert push(coordinator.url, 3, 2, LAYOUT).version == 3
    assert coordinator.stop() == 0
    assert "test-secret-key" not in coordinator.log.read_text()


def test_a_backup_is_the_journal_and_its_blobs_are_found_where_they_lie(
    coordinator_process: Start, bucket_url: str, tmp_path: Path
) -> None:
    coordinator = coordinator_process(["--blobs", bucket_url])
    coordinator.start()
    register(coordinator.url, "python")
    for sequence in (1, 2):
        push(coordinator.url, sequence, sequence - 1, LAYOUT)
    made = make_backup(coordinator.state_dir, tmp_path / "backup", 0.0, check_start)
    assert (made.events, made.blobs, made.blobs_at) == (3, 0, bucket_url)
    push(coordinator.url, 3, 2, LAYOUT)
    weights = pull(coordinator.url, ["python"])["python"]
    assert coordinator.stop() == 0
    report = verify_state(coordinator.state_dir)
    assert (report.blobs, report.versions, report.findings) == (3, 3, [])
    restore(tmp_path / "backup", tmp_path / "restored")
    assert (verify_state(tmp_path / "restored").unnamed, verify_state(tmp_path / "restored").findings) == (1, [])
    again = CoordinatorProcess(tmp_path / "restored", arguments=["--blobs", bucket_url])
    again.start()
    assert push(again.url, 4, 2, LAYOUT).version == 3
    assert again.stop() == 0
    coordinator.start()
    np.testing.assert_array_equal(pull(coordinator.url, ["python"])["python"], weights)
    assert coordinator.stop() == 0
    Bucket(bucket_url).put(f"blobs/{sha256(make_body(3))}", b"other")
    assert any("backup" in finding for finding in verify_state(coordinator.state_dir).findings)
    with pytest.raises(StorageFailedError):
        make_backup(coordinator.state_dir, tmp_path / "second", 0.0, check_start)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_bodies_under_way(coordinator_process: Start, bucket_url: str) -> None:
    """Sixteen bodies of 20 MB take no more than four do: what is checked at once, and nothing of what is stored."""
    coordinator = coordinator_process(["--blobs", bucket_url], fresh=True)
    coordinator.start()
    register_with(coordinator.url, REAL)
    assert coordinator.process is not None
    pid, bodies = coordinator.process.pid, [make_body(seed, REAL) for seed in range(16)]
    before = anonymous(pid)
    few = peak_of_pushes(coordinator.url, pid, bodies[:4], "a")
    many = peak_of_pushes(coordinator.url, pid, bodies, "b")
    print(f"MB: {before:.0f} before, {few:.0f} with 4 bodies, {many:.0f} with 16")
    assert many < few + 60
    assert many < before + 200


def peak_of_pushes(url: str, pid: int, bodies: list[bytes], letter: str) -> float:
    """The most anonymous memory of a process, in MB, while it takes all bodies at once."""
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peak[0] = max(peak[0], anonymous(pid))

    def one(index: int) -> str:
        worker = f"{letter}{index}"
        header = UpdateHeader(expert="python", worker=worker, epoch=EPOCH, sequence=0, base_version=0)
        with CoordinatorClient(url) as client:
            return client.push(header, bodies[index]).result.status

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with ThreadPoolExecutor(len(bodies)) as pool:
            assert set(pool.map(one, range(len(bodies)))) == {"landed"}
    finally:
        done.set()
        watching.join()
    return peak[0]


def anonymous(pid: int) -> float:
    """Anonymous memory of a process in MB."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) / 1024
