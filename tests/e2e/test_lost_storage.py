"""A real coordinator whose state folder vanishes, is replaced or lies on a full disk: it says so."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crash_load import pull, register
from support import EPOCH, CoordinatorProcess, make_body

from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import UpdateHeader

Start = Callable[..., CoordinatorProcess]


def push(url: str, sequence: int) -> int:
    header = UpdateHeader(expert="python", worker="w1", epoch=EPOCH, sequence=sequence, base_version=0)
    with CoordinatorClient(url) as client:
        return client.push(header, make_body(sequence)).result.version


def health(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
            return answer.status, json.load(answer)["status"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["status"]


def becomes_unhealthy(url: str) -> None:
    deadline = time.monotonic() + 20
    while health(url) == (200, "ok"):
        assert time.monotonic() < deadline, "it still says that all is well"
        time.sleep(0.02)
    assert health(url) == (503, "failed")


def vanish(state: Path) -> None:
    os.rename(state, state.with_name("moved"))


def replace_by_an_empty_one(state: Path) -> None:
    vanish(state)
    (state / "blobs" / "incoming").mkdir(parents=True)


def replace_by_a_copy(state: Path) -> None:
    vanish(state)
    shutil.copytree(state.with_name("moved"), state)


def lose_the_blobs(state: Path) -> None:
    os.rename(state / "blobs", state.with_name("blobs-moved"))


@pytest.mark.parametrize("lose", [vanish, replace_by_a_copy, lose_the_blobs])
def test_without_its_folder_a_coordinator_that_nobody_asks_is_unhealthy_and_ends_with_74(
    lose: Callable[[Path], None], coordinator_process: Start
) -> None:
    coordinator = coordinator_process()
    coordinator.start()
    register(coordinator.url, "python")
    assert push(coordinator.url, 0) == 1
    lose(coordinator.state_dir)
    becomes_unhealthy(coordinator.url)
    assert coordinator.wait() == 74
    assert str(coordinator.state_dir) in coordinator.log.read_text().splitlines()[-1]


@pytest.mark.parametrize("lose", [replace_by_an_empty_one])
def test_what_would_go_into_a_folder_that_is_gone_is_not_acknowledged(
    lose: Callable[[Path], None], coordinator_process: Start
) -> None:
    coordinator = coordinator_process()
    coordinator.start()
    register(coordinator.url, "python")
    assert push(coordinator.url, 0) == 1
    lose(coordinator.state_dir)
    with pytest.raises(CoordinatorUnavailableError, match="storage_failed"):
        push(coordinator.url, 1)
    with CoordinatorClient(coordinator.url, attempts=1) as client, pytest.raises(CoordinatorUnavailableError) as told:
        client.roll_back("python", 0)
    assert "storage_failed" in str(told.value)
    assert coordinator.wait() == 74
    shutil.rmtree(coordinator.state_dir, ignore_errors=True)
    os.rename(coordinator.state_dir.with_name("moved"), coordinator.state_dir)
    coordinator.start()
    assert push(coordinator.url, 1) == 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=4m,mode=0700"]
    if subprocess.run(["mount", *options, "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("mounting a small disk takes an administrator")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """Fill a disk but for so many bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    os.truncate(filler, filler.stat().st_size - left)
    return filler


@pytest.mark.parametrize("left", [0, 8192])
def test_a_start_on_a_full_disk_says_so_and_works_once_there_is_room_10(left: int, small_disk: Path) -> None:
    coordinator = CoordinatorProcess(small_disk)
    try:
        coordinator.start()
        register(coordinator.url, "python")
        assert push(coordinator.url, 0) == 1
        before = pull(coordinator.url, ["python"])["python"]
        assert coordinator.stop() == 0
        filler = fill(small_disk, left)
        with pytest.raises(AssertionError, match="did not start"):
            coordinator.start()
        told = coordinator.log.read_text().splitlines()[-1]
        assert "is full" in told
        assert "free disk space and start again" in told
        assert "backup" not in told
        assert coordinator.wait() == 1
        filler.unlink()
        coordinator.start()
        assert (pull(coordinator.url, ["python"])["python"] == before).all()
    finally:
        coordinator.kill()
