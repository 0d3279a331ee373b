"""The machine is sampled beside a run: memory, CPU, GPU, disk (E9)."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from structlog.testing import capture_logs

from fedmoe.monitor.system import find_gpus, no_gpus, sample, sampled_system
from fedmoe.runtime.machine import memory
from fedmoe.runtime.records import RecordValue, RecordWriter, read_records


class Kept:
    """Keeps what is kept, and lets a test wait for it."""

    def __init__(self, fail: Callable[[], bool] = lambda: False) -> None:
        self.records: list[dict[str, RecordValue]] = []
        self._fail = fail
        self._came = threading.Condition()

    def write(self, kind: str, **values: RecordValue) -> None:
        with self._came:
            self.records.append({"kind": kind, **values})
            self._came.notify_all()
        if self._fail():
            raise OSError("no room")

    def close(self) -> None: ...

    def wait(self, count: int) -> None:
        with self._came:
            assert self._came.wait_for(lambda: len(self.records) >= count, timeout=20)


def two_gpus() -> tuple[float | None, int] | None:
    return 35.0, 3_000_000_000


def test_a_sample_has_the_machines_numbers(tmp_path: Path) -> None:
    """E9."""
    found = sample(tmp_path, two_gpus, memory_limit_bytes=32 * 2**30)
    assert 0 <= found.cpu_percent <= 100
    assert 0 < found.memory_percent < 100
    assert 10 * 2**20 < found.process_bytes < memory().total
    assert found.memory_limit_bytes == 32 * 2**30
    assert (found.gpu_percent, found.gpu_memory_bytes) == (35.0, 3_000_000_000)
    assert 0 <= found.disk_percent <= 100
    assert found.disk_free_bytes > 0


def test_without_a_gpu_its_values_are_null(tmp_path: Path) -> None:
    found = sample(tmp_path, no_gpus)
    assert (found.gpu_percent, found.gpu_memory_bytes) == (None, None)


def test_finding_gpus_never_fails(tmp_path: Path) -> None:
    read = find_gpus()()
    assert read is None or read[1] >= 0


class DriverError(Exception):
    pass


def driver(monkeypatch: pytest.MonkeyPatch, busy: Sequence[int | None], broken: bool = False) -> None:
    """The NVIDIA driver's library with a GPU for each entry of `busy`: its percent, None when it does not tell."""

    def start() -> None:
        if broken:
            raise DriverError("driver not loaded")

    def rates(gpu: int) -> SimpleNamespace:
        if busy[gpu] is None:
            raise DriverError("not supported")
        return SimpleNamespace(gpu=busy[gpu], memory=1)

    library = ModuleType("pynvml")
    vars(library).update(
        NVMLError=DriverError,
        nvmlInit=start,
        nvmlDeviceGetCount=lambda: len(busy),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetUtilizationRates=rates,
        nvmlDeviceGetMemoryInfo=lambda gpu: SimpleNamespace(used=1000 * (gpu + 1)),
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)


def test_several_gpus_give_the_mean_of_use_and_the_sum_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, [10, 50])
    assert find_gpus()() == (30.0, 3000)


def test_a_gpu_that_does_not_tell_counts_with_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, [None, 40])
    assert find_gpus()() == (40.0, 3000)
    driver(monkeypatch, [None])
    assert find_gpus()() == (None, 1000)


def test_a_driver_that_is_not_loaded_is_a_machine_without_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, [10], broken=True)
    assert find_gpus()() is None


def test_memory_counts_what_the_process_started(tmp_path: Path) -> None:
    alone = sample(tmp_path, no_gpus).process_bytes
    code = "import sys; kept = bytearray(60_000_000); print('ready', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert sample(tmp_path, no_gpus).process_bytes > alone + 50_000_000
        child.communicate("")


def test_a_folder_that_is_not_there_is_an_error_at_the_start(tmp_path: Path) -> None:
    nowhere = sampled_system(Kept(), tmp_path / "nowhere", read_gpus=no_gpus)
    with pytest.raises(OSError, match="nowhere"), nowhere:
        pass


def test_the_machine_is_sampled_until_the_end(tmp_path: Path) -> None:
    kept = Kept()
    with sampled_system(kept, tmp_path, 0.01, read_gpus=no_gpus):
        kept.wait(3)
    assert all(record["kind"] == "system" for record in kept.records)
    assert "system-sampler" not in {thread.name for thread in threading.enumerate()}


def test_the_limit_is_asked_for_each_time(tmp_path: Path) -> None:
    limits = iter(range(1, 1000))
    kept = Kept()
    with sampled_system(kept, tmp_path, 0.01, lambda: next(limits), no_gpus):
        kept.wait(3)
    assert [record["memory_limit_bytes"] for record in kept.records[:3]] == [1, 2, 3]


def test_a_write_that_fails_is_said_once_and_tried_again(tmp_path: Path) -> None:
    kept = Kept(fail=lambda: True)
    with capture_logs() as logs, sampled_system(kept, tmp_path, 0.01, read_gpus=no_gpus):
        kept.wait(4)
    assert [(log["event"], log["reason"]) for log in logs] == [("system_sample_failed", "no room")]


def test_samples_land_in_a_runs_records(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "metrics.jsonl")
    with sampled_system(writer, tmp_path, 0.01, read_gpus=no_gpus):
        while os.path.getsize(tmp_path / "metrics.jsonl") == 0:
            threading.Event().wait(0.01)
    writer.close()
    record = next(read_records(tmp_path / "metrics.jsonl"))
    assert record["kind"] == "system"
    assert record["gpu_percent"] is None
