"""A coordinator that is killed while it erases a worker: the next start ends it, and nobody has to ask again."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from crash_load import pull, register
from support import EPOCH, CoordinatorProcess, make_body, sha256

from fedmoe.server.history.verification import verify_state
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import UpdateHeader

ONLINE = ("--start-from", "gateway", "--merge-after", "1000")


@pytest.mark.parametrize("arguments", [(), ONLINE])
@pytest.mark.parametrize("place", ["erase.wanted", "erase.noted", "erase.blobs_gone"])
def test_the_next_start_ends_an_erasure_that_was_killed(
    coordinator_process: Callable[..., CoordinatorProcess], place: str, arguments: tuple[str, ...]
) -> None:
    coordinator = coordinator_process(arguments)
    coordinator.start(f"{place}=1")
    register(coordinator.url, "python")
    with CoordinatorClient(coordinator.url, attempts=1) as client:
        for sequence, worker in enumerate(("w1", "w2", "w1")):
            header = UpdateHeader(expert="python", worker=worker, epoch=EPOCH, sequence=sequence, base_version=0)
            client.push(header, make_body(sequence))
        with pytest.raises(CoordinatorUnavailableError):
            client.retract("python", "w1", erase=True)
    assert coordinator.wait() == -9
    coordinator.start()
    blobs, mine = coordinator.state_dir / "blobs", {sha256(make_body(seed)) for seed in (0, 2)}
    deadline = time.monotonic() + 60
    while "erased" not in coordinator.log.read_text() or any((blobs / digest).exists() for digest in mine):
        assert time.monotonic() < deadline, coordinator.log.read_text()[-2000:]
        time.sleep(0.05)
    assert (blobs / sha256(make_body(1))).exists()
    before = pull(coordinator.url, ["python"])["python"]
    assert coordinator.stop() == 0
    assert verify_state(coordinator.state_dir).findings == []
    coordinator.start()
    assert (pull(coordinator.url, ["python"])["python"] == before).all()
