"""The machine, as a process may use it: cores, memory, the container's limits; versions and hardware for reports.

A container shows its processes the whole machine and holds them to less; its limits are files of control groups. All
sizes are in bytes.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from fedmoe import __version__

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
# Of a group's pages those that the kernel gives away before it kills: files it can read again, and its own caches.
_RECLAIMABLE = {
    1: ("total_inactive_file", "total_active_file"),
    2: ("inactive_file", "active_file", "slab_reclaimable"),
}
_PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors", "textarena", "reasoning-gym", "openskill", "vllm")
_CPU_INFORMATION = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Memory:
    """`total`: what this process may use at most; `available`: what of that is free now, in bytes."""

    total: int
    available: int

    @property
    def percent(self) -> float:
        """The share that is in use, 0 to 100."""
        return 100.0 * (self.total - self.available) / self.total


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """A control group that a process is in: the version of the interface, 1 or 2, and the folder of its files."""

    version: int
    folder: Path


def memory() -> Memory:
    """The memory of this machine, or of the container where that has less."""
    machine = psutil.virtual_memory()
    groups = own_groups("memory", _own_cgroup(), _CGROUPS)
    limits = [limit for group in groups if (limit := group_memory(group)) is not None]
    total = min([int(machine.total), *(limit.total for limit in limits)])
    available = min([int(machine.available), *(limit.available for limit in limits)])
    return Memory(total, min(total, available))


def machine_memory() -> int:
    """The bytes of memory that the machine has, whatever a container may use of them."""
    return int(psutil.virtual_memory().total)


def available_memory() -> int:
    """The bytes that can be taken now without anything being killed for it."""
    return memory().available


def usable_cores() -> float:
    """The cores this process may keep busy: those it is bound to, or its container's share of them."""
    shares = [share for group in own_groups("cpu", _own_cgroup(), _CGROUPS) if (share := cpu_share(group)) is not None]
    return min([float(len(bound_cores())), *shares])


def bound_cores() -> set[int]:
    """The numbers of the cores this process is bound to: all, where nothing binds it."""
    return set(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def busy_cores(seconds: float) -> float:
    """How many of the cores this process is bound to were busy, on average over a sample of `seconds`."""
    before = psutil.cpu_times(percpu=True)
    time.sleep(seconds)
    after = psutil.cpu_times(percpu=True)
    bound = bound_cores()
    cores = enumerate(zip(before, after, strict=False))
    return sum(_busy_share(first._asdict(), last._asdict()) for core, (first, last) in cores if core in bound)


def _busy_share(before: dict[str, float], after: dict[str, float]) -> float:
    spent = {name: max(0.0, after[name] - before[name]) for name in after}
    # A guest's time is counted in user time already, and waiting for a disk leaves the core free.
    total = sum(seconds for name, seconds in spent.items() if not name.startswith("guest"))
    idle = spent["idle"] + spent.get("iowait", 0.0)
    return (total - idle) / total if total > 0 else 0.0


def _own_cgroup() -> str:
    return _OWN_CGROUP.read_text("utf-8") if _OWN_CGROUP.is_file() else ""


def own_groups(controller: str, own: str, root: Path) -> Iterator[ControlGroup]:
    """The groups that may limit a process, by the text of its /proc/self/cgroup: its own and all above it.

    Inside a container the path may be that of the host; the mounted root then is the own group, and always asked.
    """
    for line in own.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            version, folder = 2, root
        elif controller in controllers.split(","):
            version, folder = 1, root / controller
        else:
            continue
        place = PurePosixPath(path.removesuffix(" (deleted)"))
        below = [part.relative_to("/") for part in (place, *place.parents)] if place.is_absolute() else []
        yield from (ControlGroup(version, folder / part) for part in below if ".." not in part.parts)


def group_memory(group: ControlGroup) -> Memory | None:
    """The limit of a group and what is free below it, or None where it has no limit."""
    most, use = ("limit_in_bytes", "usage_in_bytes") if group.version == 1 else ("max", "current")
    limit = parse_limit(_text(group.folder / f"memory.{most}"))
    if limit is None:
        return None
    used = parse_limit(_text(group.folder / f"memory.{use}")) or 0
    rows = dict(line.split(maxsplit=1) for line in _text(group.folder / "memory.stat").splitlines() if " " in line)
    reclaimable = sum(parse_limit(rows.get(name, "")) or 0 for name in _RECLAIMABLE[group.version])
    return Memory(limit, max(0, limit - max(0, used - reclaimable)))


def cpu_share(group: ControlGroup) -> float | None:
    """The cores' worth of time that a group may use, or None where it has no limit."""
    if group.version == 1:
        quota, period = (_text(group.folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    else:
        quota, _, period = _text(group.folder / "cpu.max").strip().partition(" ")
    limited = quota.isdecimal() and period.isdecimal() and int(quota) > 0 and int(period) > 0
    return int(quota) / int(period) if limited else None


def parse_limit(text: str) -> int | None:
    """The number of bytes in such a file, or None where there is none (version 1 writes a huge one for that)."""
    value = text.strip()
    return int(value) if value.isdecimal() and int(value) < 1 << 60 else None


def _text(file: Path) -> str:
    try:
        return file.read_text("utf-8")
    except OSError:  # not there, or the group went away meanwhile
        return ""


def environment() -> dict[str, object]:
    """Versions and hardware for the run report; JSON types only, memory in bytes."""
    return {
        "fedmoe": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {
            name: package.version
            for name in _PACKAGES
            for package in [*importlib.metadata.distributions(name=name)][:1]
        },
        "processor": processor_name(_CPU_INFORMATION.read_text("utf-8") if _CPU_INFORMATION.is_file() else ""),
        "cores": max(1, int(usable_cores())),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_bytes": memory().total,
        "gpus": _gpus(),
    }


def processor_name(information: str) -> str:
    """The processor's name in the text of /proc/cpuinfo, or its architecture."""
    match = re.search(r"^model name\s*:\s*(.+)$", information, re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _gpus() -> list[dict[str, object]]:
    import torch

    if not torch.cuda.is_available():
        return []
    properties = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in properties]
