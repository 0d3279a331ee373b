"""Use of the machine: memory, CPU, GPU and disk, sampled beside a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import structlog

from fedmoe.runtime.machine import memory
from fedmoe.runtime.memory import used_memory
from fedmoe.runtime.periodic import repeated
from fedmoe.runtime.records import Recorder

#: Gives the mean percent that the GPUs are busy (None: none tells it) and the sum of bytes held; None without GPUs.
GpuReader = Callable[[], tuple[float | None, int] | None]


@dataclass(frozen=True, slots=True)
class SystemSample:
    """One look at the machine; the fields of a `system` record.

    `cpu_percent`: of all cores together since the look before, 0 to 100. `memory_percent`: of the memory of the
    machine or its container. `process_bytes`: resident memory of this process and all it started.
    `memory_limit_bytes`: what the run may take.
    `gpu_percent`: mean over the GPUs of the share of time one was busy; `gpu_memory_bytes`: sum over the GPUs of what
    all processes hold; both None without an NVIDIA GPU. `disk_percent` (used), `disk_free_bytes`: of the run's disk.
    """

    cpu_percent: float
    memory_percent: float
    process_bytes: int
    memory_limit_bytes: int | None
    gpu_percent: float | None
    gpu_memory_bytes: int | None
    disk_percent: float
    disk_free_bytes: int


def sample(folder: Path, read_gpus: GpuReader, memory_limit_bytes: int | None = None) -> SystemSample:
    """Look at the machine once; `folder` lies on the disk that is looked at. Raises OSError when it is not there."""
    disk = psutil.disk_usage(str(folder))
    busy, held = read_gpus() or (None, None)
    return SystemSample(
        cpu_percent=float(psutil.cpu_percent(interval=None)),
        memory_percent=memory().percent,
        process_bytes=used_memory(),
        memory_limit_bytes=memory_limit_bytes,
        gpu_percent=busy,
        gpu_memory_bytes=held,
        disk_percent=float(disk.percent),
        disk_free_bytes=int(disk.free),
    )


def no_gpus() -> None:
    """The reader for a machine without GPUs that can be asked."""


def find_gpus() -> GpuReader:
    """A reader of the NVIDIA GPUs that the driver shows; warns when there are some but nvidia-ml-py is not installed.

    A GPU that does not tell how busy it is (a slice of a shared one) counts with its memory only.
    """
    try:
        import pynvml
    except ModuleNotFoundError:
        if Path("/proc/driver/nvidia").exists():
            structlog.get_logger().warning("gpu_not_watched", fix="pip install nvidia-ml-py")
        return no_gpus
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return no_gpus

    def read() -> tuple[float | None, int] | None:
        busy, held = list[float](), list[int]()
        for handle in handles:
            with contextlib.suppress(pynvml.NVMLError):
                held.append(int(pynvml.nvmlDeviceGetMemoryInfo(handle).used))
                busy.append(float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        return (sum(busy) / len(busy) if busy else None, sum(held)) if held else None

    return read


@contextmanager
def sampled_system(
    recorder: Recorder,
    folder: Path,
    seconds: float = 5.0,
    memory_limit: Callable[[], int | None] = lambda: None,
    read_gpus: GpuReader | None = None,
) -> Iterator[None]:
    """Write a `system` record every `seconds` while inside; raises OSError when the folder is not there.

    `memory_limit` is asked each time, since the limit may be changed while running. A look or a write that fails is
    logged once and tried again next time: watching must not end what is watched.
    """
    reader = read_gpus or find_gpus()
    warned = False

    def write_sample() -> None:
        nonlocal warned
        try:
            recorder.write("system", **asdict(sample(folder, reader, memory_limit())))
        except Exception as error:
            if not warned:
                warned = True
                structlog.get_logger().warning("system_sample_failed", reason=str(error), tries_again=True)

    # The first answer to "how busy since the last time?" means nothing, and the next needs a time that has a length.
    psutil.cpu_percent(interval=None)
    psutil.disk_usage(str(folder))
    with repeated(write_sample, seconds, "system-sampler", first=min(0.1, seconds)):
        yield
