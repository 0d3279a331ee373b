"""Memory limit of a run: its choice, the guard that keeps use below it, and the control file that changes it.

All sizes are in bytes; GiB and the `_gb` of options are 2^30 of them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog

from fedmoe.runtime.errors import ExpectedError
from fedmoe.runtime.machine import memory
from fedmoe.runtime.memory_pressure import Action, Pressure, after_failure, pressure
from fedmoe.runtime.periodic import repeated

# Parameters of glibc's mallopt, from malloc.h.
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGE_BYTES = 256 << 10
_ARENAS = 2
CONTROL = "control.json"
_MOST_BYTES = 1 << 16
_log = structlog.get_logger()
GIB = 1 << 30
DEFAULT_LIMIT_GB = 32.0
#: The share of what the machine or container has that may be used: its last bytes are the kernel's to kill for.
USABLE = 0.95


def trim() -> None:
    """Give back what small blocks have left free between those that are used."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def give_back_freed_memory() -> None:
    """Give large blocks back to the system once they are freed, and keep few places for small ones; glibc only.

    By itself glibc takes the size of a freed block for the usual one: after the first freed update of 20 MB all others
    come from arenas, one for each thread, which keep what was freed.
    """
    if _is_glibc():
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_ARENA_MAX, _ARENAS)


def _is_glibc() -> bool:
    return platform.libc_ver()[0] == "glibc"


@dataclass(frozen=True, slots=True)
class Control:
    """What is asked for; None leaves a value as it is. `memory_limit_gb` counts 2^30 bytes."""

    memory_limit_gb: float | None = None
    max_batch: int | None = None


def parse_control(text: str) -> Control:
    """The content of a control file; raises ValueError and takes nothing of it unless all of it is right."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"a JSON object is needed, got {type(values).__name__}")
    unknown = sorted(values.keys() - {"memory_limit_gb", "max_batch"})
    if unknown:
        raise ValueError(f"unknown keys {unknown}; known are memory_limit_gb and max_batch")
    limit, batch = values.get("memory_limit_gb"), values.get("max_batch")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < 1 << 20):
        raise ValueError(f"memory_limit_gb must be a positive number of GiB, got {limit!r}")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch < 1 << 31):
        raise ValueError(f"max_batch must be a positive whole number, got {batch!r}")
    return Control(None if limit is None else float(limit), batch)


class ControlFile:
    """The control file of a run; one that is wrong is logged once and changes nothing, for a run must not die of it."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / CONTROL
        self._seen: tuple[int, int, int] | None = None

    def changed(self) -> Control | None:
        """What the file asks for, if it is new or was written since the last call; otherwise None."""
        try:
            status = self.path.stat()
            mark = (status.st_mtime_ns, status.st_size, status.st_ino)
            if mark == self._seen:
                return None
            self._seen = mark
            with self.path.open("rb") as file:
                control = parse_control(file.read(_MOST_BYTES).decode())
        except FileNotFoundError:
            self._seen = None
            return None
        except (OSError, ValueError) as error:
            _log.warning("control_file_ignored", file=os.fspath(self.path), reason=str(error))
            return None
        _log.info("control_file_read", memory_limit_gb=control.memory_limit_gb, max_batch=control.max_batch)
        return control


class MemoryLimitError(ExpectedError, RuntimeError):
    """The memory limit is reached and nothing is left to give up; the run stops in order, with a checkpoint."""


def choose_limit(limit_gb: float | None, available: int) -> tuple[int, str]:
    """The limit in bytes and a sentence that says how it came about; `limit_gb` None takes the default of 32.

    Never more than 95 % of what is there.
    """
    asked = DEFAULT_LIMIT_GB if limit_gb is None else limit_gb
    if not 0 < asked < 1 << 20:
        raise ValueError(f"the memory limit must be a positive number of GiB, got {asked}")
    usable = int(USABLE * available)
    origin = "the default" if limit_gb is None else "as asked for"
    if int(asked * GIB) <= usable:
        return int(asked * GIB), f"memory limit {asked:g} GiB, {origin}"
    return usable, (
        f"memory limit {usable / GIB:.1f} GiB, {USABLE:.0%} of the {available / GIB:.1f} GiB of this machine or "
        f"container, instead of {asked:g} GiB ({origin})"
    )


def used_memory() -> int:
    """The resident bytes of this process and its children; pages they share count for each, so rather too many."""
    own = psutil.Process()
    total = 0
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:  # a child that ended meanwhile uses nothing
            continue
    return total


def release_memory() -> None:
    """Give memory that Python, PyTorch and the C library keep for later back to the system, as far as they can."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    trim()


class MemoryGuard:
    """Keeps a run below its limit: ask it before every batch how many rows a micro-batch may have.

    The size of a micro-batch must not change what is learned: accumulate gradients to the same total. `used` gives the
    bytes in use, `available` those there are.
    """

    def __init__(
        self,
        limit: int,
        batch: int,
        least: int = 1,
        *,
        used: Callable[[], int] = used_memory,
        available: int | None = None,
    ) -> None:
        self.limit = limit
        self.peak = 0
        self._state = Pressure(batch, batch, least)
        self._used = used
        self._available = memory().total if available is None else available
        self._caches: dict[str, Callable[[], None]] = {}
        self._most_since_check = 0

    @property
    def batch(self) -> int:
        """The micro-batch in force."""
        return self._state.batch

    def register_cache(self, name: str, empty: Callable[[], None]) -> None:
        """Have `empty` called when memory gets short."""
        self._caches[name] = empty

    def apply(self, control: Control) -> None:
        """Follow what was asked for while running."""
        if control.memory_limit_gb is not None:
            self.limit, sentence = choose_limit(control.memory_limit_gb, self._available)
            _log.info("memory_limit_changed", limit_bytes=self.limit, reason=sentence)
        if control.max_batch is not None:
            before = self.batch
            self._state = self._state.with_most(control.max_batch)
            _log.info("memory_most_batch_changed", most=self._state.most, before=before, after=self.batch)

    def observe(self) -> int:
        """Measure now, for the next check to know of; returns the bytes in use. Another thread may call it."""
        used = self._used()
        self._most_since_check = max(self._most_since_check, used)
        self.peak = max(self.peak, used)
        return used

    def check(self) -> int:
        """Look, act if need be, and return the micro-batch to use now; raises MemoryLimitError to stop in order."""
        self.observe()
        used, self._most_since_check = self._most_since_check, 0
        before = self.batch
        action, self._state = pressure(used, self.limit, self._state)
        if action is Action.STOP:
            text = f"{used / GIB:.2f} GiB are in use, above the limit of {self.limit / GIB:.2f} GiB, and caches are "
            raise self._stop(text + f"empty and the micro-batch is at its smallest ({before})")
        if action is Action.DROP_CACHES:
            self._drop_caches(used)
        if self.batch != before:
            self._log_batch(before, f"{used / GIB:.2f} of {self.limit / GIB:.2f} GiB in use")
        return self.batch

    def failed(self, what: str) -> int:
        """After an allocation failed: the smaller micro-batch to try again with; raises MemoryLimitError if none is."""
        before, state = self.batch, after_failure(self._state)
        self._drop_caches(self.observe())
        if state is None:
            raise self._stop(f"{what}, and the micro-batch is at its smallest ({before})")
        self._state = state
        self._log_batch(before, what)
        return self.batch

    def _drop_caches(self, used: int) -> None:
        for empty in self._caches.values():
            empty()
        release_memory()
        _log.warning(
            "memory_caches_dropped",
            caches=sorted(self._caches),
            used_bytes=used,
            after_bytes=self._used(),
            limit_bytes=self.limit,
        )

    def _log_batch(self, before: int, reason: str) -> None:
        event = "memory_batch_reduced" if self.batch < before else "memory_batch_raised"
        _log.warning(event, before=before, after=self.batch, reason=reason)

    def _stop(self, reason: str) -> MemoryLimitError:
        _log.error("memory_limit_reached", reason=reason, limit_bytes=self.limit)
        return MemoryLimitError(
            f"{reason}. Raise the memory limit, train fewer policies, or use a lower rank or shorter answers; "
            "the run can be resumed from its last checkpoint"
        )


@contextmanager
def watched(guard: MemoryGuard, seconds: float = 0.5) -> Iterator[None]:
    """Measure every `seconds` in a thread while inside, so that a check also sees the peak within a batch."""
    with repeated(guard.observe, seconds, "memory-watch"):
        yield


def limit_gpu(device: str, limit_gb: float) -> str:
    """Let this process use at most `limit_gb` GiB of a CUDA device's memory; returns a sentence that says so.

    Beyond it PyTorch raises its out-of-memory error instead of taking from others. Other devices have no such limit,
    and the sentence says that; a device that is not there is a DeviceError.
    """
    if not 0 < limit_gb < 1 << 20:
        raise ValueError(f"the GPU memory limit must be a positive number of GiB, got {limit_gb}")
    kind, _, _ = device.partition(":")
    if kind != "cuda":
        return f"the GPU memory limit of {limit_gb:g} GiB has no effect on {device}"
    import torch

    from fedmoe.runtime.device import choose_device

    chosen = choose_device(device)
    total = torch.cuda.get_device_properties(chosen).total_memory
    fraction = min(limit_gb * GIB / total, 1.0)
    torch.cuda.set_per_process_memory_fraction(fraction, chosen)
    return f"GPU memory limit {fraction * total / GIB:.1f} of {total / GIB:.1f} GiB on {chosen}"
