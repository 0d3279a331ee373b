"""Checks of a worker's options that need neither coordinator nor base model."""

from __future__ import annotations

import os

from fedmoe.config import WorkerConfig
from fedmoe.datasets.row_scan import RowOptions, check_beginning


class OptionError(ValueError):
    """An option that cannot be used here; the message names its flag."""


def check_processes(config: WorkerConfig) -> None:
    """Refuse a device that only one of several processes (torchrun) can have."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return
    if ":" in config.device or config.device == "mps":
        raise OptionError(
            f"--device {config.device} names one device, but WORLD_SIZE is {os.environ['WORLD_SIZE']}: "
            "give --device cuda, of which each process takes its own, or start one process"
        )


def check_sources(config: WorkerConfig) -> None:
    """Look at the first rows of every file, before any model is loaded; raises `DataError`."""
    for name in (config.dataset, config.eval_dataset):
        if name is not None:
            check_beginning(name, RowOptions.mapping(config.map))
