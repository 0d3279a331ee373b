"""The line on the disk at a start, and what it rests on."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs
from support import EPOCH, MANIFEST

from fedmoe.config import CoordinatorConfig
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.federation.events import UpdateAccepted
from fedmoe.server.upkeep.retention import RetentionBound, disk_line, growth

GB = 1_000_000_000


def update(worker: str, at: float, digest: str = "d", expert: str = "python") -> UpdateAccepted:
    return UpdateAccepted(expert, worker, EPOCH, int(at), 0, digest, 0, 1.0, int(at), at)


def test_without_updates_it_says_what_is_assumed() -> None:
    assumed = growth(4_880_000, 1.0, [], {})
    assert disk_line(assumed, 71 * GB, 35 * GB) == (
        "19.5 MB an update, 7.03 GB an hour and worker, 71 GB free = 10 h of one worker "
        "(assumed: float32 and an update every 10 s); the newest 35 GB of updates are kept, 5 h of one worker"
    )
    assert growth(1, 60.0, [], {}).seconds == 60.0


def test_what_was_seen_is_taken_instead() -> None:
    newest = [update(worker, at) for at in (0.0, 20.0, 40.0) for worker in ("w1", "w2")]
    seen = growth(1, 1.0, newest, {"d": 1_000_000})
    assert (seen.update, seen.seconds, seen.workers) == (1_000_000, 20.0, 2)
    line = disk_line(seen, 36 * GB, GB)
    assert "1 MB an update, 180 MB an hour and worker, 36 GB free = 4.17 days of 2 workers (as the last 6" in line


def test_bytes_that_are_gone_are_not_averaged_and_a_clock_set_back_is_no_gap() -> None:
    newest = [update("w1", 0.0, "gone"), update("w1", 50.0), update("w1", 10.0), update("w1", 25.0)]
    seen = growth(1, 1.0, newest, {"d": 500})
    assert (seen.update, seen.seconds) == (500, 15.0)


@pytest.mark.parametrize(("keep_gb", "most"), [(None, None), (0.25, 250_000_000)])
def test_a_coordinator_says_it_when_it_starts_and_when_its_first_expert_comes(
    keep_gb: float | None, most: int | None, tmp_path: Path
) -> None:
    config = CoordinatorConfig(state_dir=str(tmp_path / "state"), keep_gb=keep_gb)
    with capture_logs() as lines:
        first = DistributedCoordinator(config)
    assert not [line for line in lines if line["event"] == "disk"]
    with capture_logs() as lines:
        first.service.on_first_expert(first.service.coordinator.register_expert("python", MANIFEST))  # type: ignore[misc]
    (told,) = [line for line in lines if line["event"] == "disk"]
    assert "an hour and worker" in told["says"]
    assert "assumed" in told["says"]
    if most is not None:
        assert told["kept_gb"] == RetentionBound(most, "").gb
        assert told["kept_by"] == "--keep-gb"
    else:
        assert "half of the disk" in told["kept_by"]
    first.close()
