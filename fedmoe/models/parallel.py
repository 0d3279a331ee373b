"""The group of processes that train one expert together, as torchrun or accelerate start them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed


class ParallelError(RuntimeError):
    """An environment that does not describe a usable group of processes."""


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """This process's place among those that train together; with `world_size` 1 every method does nothing."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by the sum over all ranks, in place."""
        if self.world_size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def broadcast_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` by rank 0's, in place."""
        if self.world_size > 1:
            distributed.broadcast(tensor, 0)
        return tensor

    def number(self, value: int) -> int:
        """Rank 0's `value`, on every rank; what the other ranks pass does not count."""
        if self.world_size == 1:
            return value
        return int(self.broadcast_(torch.tensor([value], dtype=torch.int64, device=self.device)).item())

    def flag(self, value: bool) -> bool:
        """Rank 0's decision, on every rank."""
        return bool(self.number(int(value)))

    def any_flag(self, value: bool) -> bool:
        """Whether any rank says yes, on every rank."""
        if self.world_size == 1:
            return value
        return bool(self.sum_(torch.tensor([int(value)], dtype=torch.int64, device=self.device)).item())

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.any_flag(False)

    def close(self) -> None:
        """Leave the group."""
        if self.world_size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


def local_rank() -> int:
    """LOCAL_RANK, or 0 outside torchrun; it chooses the CUDA device."""
    return _number("LOCAL_RANK", 0)


def join_group(device: torch.device, timeout_seconds: float = 600.0) -> ProcessGroup:
    """Join the group that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT describe (torchrun, accelerate).

    gloo on CPU, nccl on CUDA. No WORLD_SIZE or 1 is a single process. A rank that stays away fails the others after
    `timeout_seconds`. Raises ParallelError when the environment is incomplete.
    """
    world_size = _number("WORLD_SIZE", 1)
    if world_size == 1:
        return ProcessGroup(device=device)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ParallelError(f"WORLD_SIZE is {world_size} but {', '.join(missing)} are not set; start with torchrun")
    rank = _number("RANK", 0)
    if rank >= world_size:
        raise ParallelError(f"RANK is {rank}, but WORLD_SIZE is {world_size}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(
        backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_seconds)
    )
    return ProcessGroup(rank, world_size, device)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ParallelError(f"{name} must be a number from 0 up, got {text!r}")
    return int(text)
