"""The memory limit (E16, E18): decided by pure rules, held by a guard, changed while running."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fedmoe.runtime.machine import memory
from fedmoe.runtime.memory import (
    GIB,
    Control,
    ControlFile,
    MemoryGuard,
    MemoryLimitError,
    choose_limit,
    limit_gpu,
    used_memory,
    watched,
)

# The limit


def test_the_limit_is_32_gib_or_what_is_there_and_says_so_e16() -> None:
    assert choose_limit(None, 256 * GIB) == (32 * GIB, "memory limit 32 GiB, the default")
    limit, sentence = choose_limit(None, 20 * GIB)
    assert limit == 19 * GIB
    assert "19.0 GiB, 95% of the 20.0 GiB of this machine or container, instead of 32 GiB (the default)" in sentence
    assert choose_limit(4, 20 * GIB) == (4 * GIB, "memory limit 4 GiB, as asked for")
    assert choose_limit(64, 20 * GIB)[0] == 19 * GIB


@pytest.mark.parametrize("wanted", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_is_no_positive_number_is_refused(wanted: float) -> None:
    with pytest.raises(ValueError, match="positive number of GiB"):
        choose_limit(wanted, GIB)


def test_what_is_available_is_at_least_what_this_test_uses() -> None:
    assert used_memory() < memory().total


def test_the_memory_of_children_counts_too() -> None:
    code = "x = bytearray(60 << 20); x[::4096] = b'1' * len(x[::4096]); print(1, flush=True); input()"
    before = used_memory()
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"1\n"
    assert used_memory() - before > 50 << 20
    child.communicate(b"\n")


# The guard


class Meter:
    """What is in use, as the test says."""

    def __init__(self, used: int = 0) -> None:
        self.used = used

    def __call__(self) -> int:
        return self.used


def events(lines: list[dict[str, object]]) -> list[object]:
    return [line["event"] for line in lines]


def test_the_guard_empties_caches_then_halves_then_stops_with_a_line_each_e16() -> None:
    meter = Meter(900)
    guard = MemoryGuard(1000, 4, 2, used=meter, available=1 << 40)
    emptied: list[str] = []
    guard.register_cache("prefix", lambda: emptied.append("prefix"))
    guard.register_cache("batches", lambda: emptied.append("batches"))
    with capture_logs() as lines:
        assert [guard.check(), guard.check()] == [4, 2]
        meter.used = 1200
        assert guard.check() == 2
        with pytest.raises(MemoryLimitError, match=r"above the limit.*smallest \(2\).*can be resumed"):
            guard.check()
    assert emptied == ["prefix", "batches"] * 2
    assert events(list(map(dict, lines))) == [
        "memory_caches_dropped",
        "memory_batch_reduced",
        "memory_caches_dropped",
        "memory_limit_reached",
    ]
    assert guard.peak == 1200


def test_a_peak_within_a_batch_counts_at_the_next_check_even_when_it_is_over() -> None:
    meter = Meter(900)
    guard = MemoryGuard(1000, 4, used=meter, available=1 << 40)
    guard.check()
    guard.observe()
    meter.used = 10
    assert guard.check() == 2
    assert guard.check() == 2


def test_a_thread_sees_the_peak_within_a_batch() -> None:
    measured: list[int] = []

    def used() -> int:
        measured.append(1)
        return 950 if len(measured) == 2 else 10

    guard = MemoryGuard(1000, 4, used=used, available=1 << 40)
    with watched(guard, seconds=0.005):
        while len(measured) < 4:
            pass
    assert guard.peak == 950


def test_an_allocation_that_failed_is_tried_with_less_and_at_the_floor_is_the_end() -> None:
    guard = MemoryGuard(1000, 2, used=Meter(10), available=1 << 40)
    with capture_logs() as lines:
        assert guard.failed("CUDA out of memory") == 1
    assert events(list(map(dict, lines))) == ["memory_caches_dropped", "memory_batch_reduced"]
    with pytest.raises(MemoryLimitError, match="CUDA out of memory, and the micro-batch is at its smallest"):
        guard.failed("CUDA out of memory")


def test_the_limit_and_the_largest_batch_change_while_running_e16(tmp_path: Path) -> None:
    guard = MemoryGuard(32 * GIB, 8, used=Meter(0), available=100 * GIB)
    file = ControlFile(tmp_path)
    assert file.changed() is None
    (tmp_path / "control.json").write_text('{"memory_limit_gb": 4.5, "max_batch": 2}')
    control = file.changed()
    assert control == Control(4.5, 2)
    with capture_logs() as lines:
        guard.apply(control)
    assert (guard.limit, guard.check()) == (int(4.5 * GIB), 2)
    assert events(list(map(dict, lines))) == ["memory_limit_changed", "memory_most_batch_changed"]
    guard.apply(Control(memory_limit_gb=500))
    assert guard.limit == 95 * GIB
    guard.apply(Control())
    assert (guard.limit, guard.batch) == (95 * GIB, 2)


# A real process

HUNGRY = """
import sys
from fedmoe.runtime import logs
from fedmoe.runtime.memory import MemoryGuard, MemoryLimitError, used_memory
logs.configure()
def block(): return bytearray(b"1" * (30 << 20))
limit = used_memory() + (100 << 20)
guard = MemoryGuard(limit, 4, 1)
cache = [block() for _ in range(4)]
guard.register_cache("blocks", cache.clear)
print(guard.check(), len(cache), used_memory() < limit, flush=True)
held = []
try:
    while True:
        held.append(block())
        guard.check()
except MemoryLimitError as error:
    print(guard.batch, len(held), str(error)[-50:])
    sys.exit(7)
"""


def test_a_real_process_over_a_small_limit_empties_its_cache_shrinks_and_stops_in_order_e16() -> None:
    done = subprocess.run([sys.executable, "-c", HUNGRY], capture_output=True, text=True, timeout=60, check=False)
    first, second = done.stdout.splitlines()
    assert first == "2 0 True"
    batch, held, *words = second.split()
    assert done.returncode == 7
    assert (batch, int(held) <= 7) == ("1", True)
    assert " ".join(words).endswith("resumed from its last checkpoint")
    logged = [json.loads(line)["event"] for line in done.stderr.splitlines()]
    assert logged[:2] == ["memory_caches_dropped", "memory_batch_reduced"]
    assert logged[-1] == "memory_limit_reached"


# The GPU


def test_a_gpu_limit_says_that_it_does_nothing_without_a_gpu_e18() -> None:
    assert limit_gpu("cpu", 8) == "the GPU memory limit of 8 GiB has no effect on cpu"
    with pytest.raises(ValueError, match="positive number of GiB"):
        limit_gpu("cpu", 0)


@pytest.mark.gpu
def test_a_gpu_limit_holds_e18() -> None:
    import torch

    assert "GPU memory limit 1.0 of" in limit_gpu("cuda:0", 1)
    kept = torch.empty(GIB // 2, dtype=torch.uint8, device="cuda:0")
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(GIB, dtype=torch.uint8, device="cuda:0")
    del kept
    torch.cuda.set_per_process_memory_fraction(1.0, 0)
