"""Device failures: classifies errors (out of memory, broken device), and halves batches for which memory ran out."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import fields

import torch

from fedmoe.datasets.tokens.packing import Batch

# How drivers and libraries begin the message of an error that is the device's.
_BROKEN = ("CUDA error", "HIP error", "cuDNN error", "CUDNN_STATUS", "CUBLAS_STATUS", "NCCL error", "MPS error")
_ACCELERATOR_ERROR = getattr(torch, "AcceleratorError", torch.OutOfMemoryError)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the CPU's allocator, had no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def device_fault(error: BaseException) -> str | None:
    """One line on what is wrong with the device and what to do; None for an error that is not the device's."""
    first = next(iter(str(error).splitlines()), type(error).__name__)[:300]
    if is_out_of_memory(error):
        return (
            f"the device has no memory left ({first}). Give a smaller --per-device-train-batch-size or --max-length, "
            "or --gradient-checkpointing"
        )
    broken = isinstance(error, _ACCELERATOR_ERROR) or any(words in first for words in _BROKEN)
    if isinstance(error, RuntimeError) and broken:
        return (
            f"the device failed ({first}). Look at nvidia-smi and the kernel's log (Xid); restart the worker, on "
            "another device (--device) if it happens again"
        )
    return None


def halve_batches(batches: Sequence[Batch]) -> list[Batch] | None:
    """The same rows in batches of at most half as many; None where each has a single row already."""
    largest = max(len(batch.input_ids) for batch in batches)
    if largest < 2:
        return None
    rows, names = -(-largest // 2), [field.name for field in fields(Batch)]
    return [
        Batch(**{name: getattr(batch, name)[start : start + rows] for name in names})
        for batch in batches
        for start in range(0, len(batch.input_ids), rows)
    ]


def free_unused() -> None:
    """Free what no tensor uses any more, so that a smaller batch finds room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
