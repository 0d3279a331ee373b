"""Environment of a run for its report: versions, processor, memory, GPUs; names no person and no machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from pathlib import Path

from fedmoe import __version__
from fedmoe.runtime.machine import memory, usable_cores

_PACKAGES = ("torch", "transformers", "peft", "numpy", "safetensors", "textarena", "reasoning-gym", "openskill", "vllm")
_CPU_INFORMATION = Path("/proc/cpuinfo")


def environment() -> dict[str, object]:
    """Versions and hardware for the run report; JSON types only, memory in bytes."""
    return {
        "fedmoe": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: version for name in _PACKAGES if (version := _version(name)) is not None},
        "processor": processor_name(_CPU_INFORMATION.read_text("utf-8") if _CPU_INFORMATION.is_file() else ""),
        "cores": max(1, int(usable_cores())),
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "memory_bytes": memory().total,
        "gpus": _gpus(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


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
