"""Device and precision that PyTorch will choose here, and GPUs its build cannot use; known without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_MIB = 2**20
_CUDA_VERSION = re.compile(r"^cuda\b[^=\n]*=\s*(?:'([^']+)'|\"([^\"]+)\")", re.MULTILINE)
_BF16_FLAGS = {"amx_bf16", "avx512_bf16"}
#: The package index with builds of PyTorch for CUDA 13.0, which the pinned version has.
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"


@dataclass(frozen=True, slots=True)
class Gpu:
    """An NVIDIA GPU as its driver tells it: name, memory in all and free in bytes, compute capability."""

    name: str
    total: int
    free: int
    capability: float


def nvidia_gpus() -> list[Gpu]:
    """The GPUs that `nvidia-smi` shows and CUDA_VISIBLE_DEVICES does not hide; none where the program fails."""
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return []
    query = "--query-gpu=name,memory.total,memory.free,compute_cap"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30, check=True
        )
        return [_gpu(line) for line in done.stdout.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):
        return []


def _gpu(line: str) -> Gpu:
    name, total, free, capability = (part.strip() for part in line.rsplit(",", 3))
    return Gpu(name, int(total) * _MIB, int(free) * _MIB, float(capability))


def torch_cuda() -> str | None:
    """The CUDA version that the installed PyTorch was built for; "" for a build without, None where there is none."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    file = Path(found.origin).parent / "version.py"
    match = _CUDA_VERSION.search(file.read_text("utf-8")) if file.is_file() else None
    return (match[1] or match[2]) if match is not None else ""


def unused_gpu(gpus: Sequence[Gpu], cuda: str | None) -> str | None:
    """What to say where PyTorch's build cannot use the GPU of this machine; None where all is well."""
    if not gpus or cuda is None or cuda:
        return None
    version = importlib.metadata.version("torch").partition("+")[0]
    return (
        f"torch is a CPU build but this machine has an NVIDIA GPU: {gpus[0].name}; training would use the CPU. "
        f"Install the CUDA build: pip install --force-reinstall torch=={version} --index-url {CUDA_INDEX}"
    )


def expected_device(name: str, gpus: Sequence[Gpu], cuda: str | None) -> str:
    """What --device `name` will be: `auto` takes CUDA, then MPS, then the CPU."""
    if name != "auto":
        return name
    if gpus and cuda:
        return "cuda"
    return "mps" if sys.platform == "darwin" and platform.machine() == "arm64" else "cpu"


def expected_dtype(name: str, device: str, gpus: Sequence[Gpu]) -> str:
    """What --dtype `name` will be on a device: `auto` takes what the device does well."""
    if name != "auto":
        return name
    if device.startswith("cuda"):
        return "bf16" if not gpus or gpus[0].capability >= 8 else "fp16"
    information = Path("/proc/cpuinfo")
    flags = set(information.read_text("utf-8").split()) if information.is_file() else set()
    return "bf16" if device == "cpu" and flags & _BF16_FLAGS else "fp32"
