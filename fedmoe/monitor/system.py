"""What the machine is used for: memory, CPU, GPU and disk, sampled beside a run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import psutil
import structlog

from fedmoe.runtime.machine import memory
from fedmoe.runtime.records import Value


class WriteRecord(Protocol):
    """Takes a record, for example `RecordWriter.write`."""

    def __call__(self, kind: str, **values: Value) -> None: ...


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


class GpuReader(Protocol):
    """Says how much the GPUs are used."""

    def read(self) -> tuple[float | None, int] | None:
        """Mean percent busy (None: not told) and sum of bytes held over all GPUs; None where there is none."""
        ...


def sample(folder: Path, gpus: GpuReader, memory_limit_bytes: int | None = None) -> SystemSample:
    """Look at the machine once; `folder` lies on the disk that is looked at. Raises OSError when it is not there."""
    disk = psutil.disk_usage(str(folder))
    busy = gpus.read()
    return SystemSample(
        cpu_percent=float(psutil.cpu_percent(interval=None)),
        memory_percent=memory().percent,
        process_bytes=_family_bytes(psutil.Process()),
        memory_limit_bytes=memory_limit_bytes,
        gpu_percent=busy[0] if busy else None,
        gpu_memory_bytes=busy[1] if busy else None,
        disk_percent=float(disk.percent),
        disk_free_bytes=int(disk.free),
    )


def _family_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and its descendants; one that ended meanwhile counts nothing."""
    total = 0
    for member in (process, *process.children(recursive=True)):
        try:
            total += member.memory_info().rss
        except psutil.Error:
            continue
    return total


class NoGpus:
    """A machine without GPUs that can be asked."""

    def read(self) -> tuple[float | None, int] | None:
        """Nothing."""
        return None


class NvidiaGpus:
    """Every NVIDIA GPU that the driver shows this process.

    One that does not tell how busy it is (a slice of a shared GPU) counts with its memory only.
    """

    def __init__(self) -> None:
        """Load the driver's library; raises ModuleNotFoundError or NVMLError where there is none."""
        import pynvml

        self._nvml = pynvml
        pynvml.nvmlInit()
        self._handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]

    def read(self) -> tuple[float | None, int] | None:
        """Mean percent busy (None when no GPU tells) and sum of bytes in use; None when none answers."""
        nvml = self._nvml
        busy: list[float] = []
        used: list[int] = []
        for handle in self._handles:
            with contextlib.suppress(nvml.NVMLError):
                used.append(int(nvml.nvmlDeviceGetMemoryInfo(handle).used))
                busy.append(float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu))
        return (sum(busy) / len(busy) if busy else None, sum(used)) if used else None


def find_gpus() -> GpuReader:
    """The NVIDIA GPUs of this machine, or `NoGpus`; says so when there are some but nvidia-ml-py is not installed."""
    try:
        import pynvml
    except ModuleNotFoundError:
        if Path("/proc/driver/nvidia").exists():
            structlog.get_logger().warning("gpu_not_watched", fix="pip install nvidia-ml-py")
        return NoGpus()
    try:
        return NvidiaGpus()
    except pynvml.NVMLError:
        return NoGpus()


class SystemSampler:
    """Writes a `system` record every `interval` seconds from a thread of its own, until stopped.

    `memory_limit` is asked each time, since the limit may be changed while running. A look or a write that fails is
    logged once and tried again next time: watching must not end what is watched.
    """

    def __init__(
        self,
        write: WriteRecord,
        folder: Path,
        interval: float = 5.0,
        memory_limit: Callable[[], int | None] = lambda: None,
        gpus: GpuReader | None = None,
    ) -> None:
        if interval <= 0:
            raise ValueError(f"interval is seconds between samples and must be above 0, got {interval}")
        self._write = write
        self._folder = folder
        self._interval = interval
        self._memory_limit = memory_limit
        self._gpus = gpus or find_gpus()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._warned = False

    def start(self) -> None:
        """Begin; the first record comes at once. Raises OSError when the folder is not there."""
        if self._thread is not None:
            raise RuntimeError("the sampler runs already")
        # The first answer to "how busy since the last time?" means nothing.
        psutil.cpu_percent(interval=None)
        psutil.disk_usage(str(self._folder))
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="system-sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it; returns when the last record is written. Does nothing when it does not run."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _run(self) -> None:
        # A moment first, so that "busy since the last time" is about a time that has a length.
        self._stop.wait(min(0.1, self._interval))
        while True:
            self._once()
            if self._stop.wait(self._interval):
                return

    def _once(self) -> None:
        try:
            self._write("system", **asdict(sample(self._folder, self._gpus, self._memory_limit())))
        except Exception as error:
            if not self._warned:
                self._warned = True
                structlog.get_logger().warning("system_sample_failed", reason=str(error), tries_again=True)
