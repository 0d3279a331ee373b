"""Choice of device, dtype and number of threads for PyTorch."""

from __future__ import annotations

import contextlib
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fedmoe.runtime.errors import ExpectedError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class DeviceError(ExpectedError, RuntimeError):
    """A device or dtype that was asked for and is not there."""


def choose_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The device for `auto`, `cpu`, `cuda`, `cuda:N` or `mps`; a device that was asked for but is absent is an error.

    `auto` takes CUDA, then MPS, then CPU. Without a number, CUDA takes the device of `local_rank`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and (kind != "cuda" or not number.isdecimal())):
        raise DeviceError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        return _cuda_device(int(number) if number else local_rank)
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps was asked for, but this PyTorch or machine has no MPS; use auto or cpu")
    return torch.device(kind)


def _cuda_device(index: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise DeviceError(
            f"device cuda:{index} was asked for, but PyTorch {torch.__version__} sees {count} CUDA devices; "
            "check the driver, CUDA_VISIBLE_DEVICES and the PyTorch build, or use auto or cpu"
        )
    return torch.device("cuda", index)


def free_and_total(device: torch.device) -> tuple[int, int] | None:
    """Free and total memory of a CUDA device in bytes; None where the device's memory is the machine's."""
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else None


def held_and_total(device: str) -> tuple[int, int] | None:
    """What all processes hold of a CUDA device's memory, and all of it, in bytes; None for any other device."""
    sizes = free_and_total(torch.device(device)) if device.startswith("cuda") else None
    return (sizes[1] - sizes[0], sizes[1]) if sizes is not None else None


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype for `auto`, `bf16`, `fp16` or `fp32`: `auto` takes what the device does well."""
    if name != "auto":
        if name not in DTYPES:
            raise DeviceError(f"unknown dtype {name!r}; use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bfloat16 in hardware (AMX or AVX512_BF16); emulated it is slower than fp32."""
    flags = {"amx_bf16", "avx512_bf16"}
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in flags)
    # PyTorch before that function: Linux names the same flags.
    information = Path("/proc/cpuinfo")
    return information.is_file() and not flags.isdisjoint(information.read_text("utf-8").split())


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Mixed precision in `dtype`; with float32 it does nothing."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    context: AbstractContextManager[object] = torch.autocast(device.type, dtype)
    return context


@dataclass(frozen=True, slots=True)
class LossScale:
    """The factor put on a float16 loss so that small gradients do not underflow (dynamic loss scaling).

    It halves when a gradient overflows and doubles after 2000 steps without. `value` 1 and not `dynamic` for other
    dtypes. As a value beside one flat gradient it needs less than PyTorch's GradScaler, and it goes into checkpoints.
    """

    value: float = 1.0
    good_steps: int = 0
    dynamic: bool = False

    @classmethod
    def start(cls, dtype: torch.dtype) -> LossScale:
        """The first scale: 65536 for float16, otherwise 1 for good."""
        return cls(65536.0, 0, True) if dtype == torch.float16 else cls()

    def after_overflow(self) -> LossScale | None:
        """The next scale to try, or None when the overflow is not the scale's doing."""
        return replace(self, value=self.value / 2, good_steps=0) if self.dynamic and self.value > 1.0 else None

    def after_step(self) -> LossScale:
        """The scale after a good step."""
        if not self.dynamic:
            return self
        if self.good_steps + 1 < 2000:
            return replace(self, good_steps=self.good_steps + 1)
        return replace(self, value=self.value * 2, good_steps=0)


def pin_threads(threads: int | None = None) -> int:
    """Set PyTorch's threads to `threads`, else to OMP_NUM_THREADS, else leave them; returns the number in force.

    On shared cores two spinning threads can be ten times slower than one.
    """
    if threads is None and (text := os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()):
        if not text.isdecimal():
            raise DeviceError(f"OMP_NUM_THREADS must be a number, got {text!r}")
        threads = int(text)
    if threads is not None:
        if threads < 1:
            raise DeviceError(f"the number of threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    return int(torch.get_num_threads())
