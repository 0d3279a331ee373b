"""A worker's checkpoint on disk: one safetensors file per rank and one small JSON file that names the newest set.

    latest.json                        {"serial": 3, "world_size": 2}: the commit point
    checkpoint-00000003-rank-0.safetensors   tensors, and one JSON object in the header's metadata

Every file is written under a temporary name, made durable and renamed. A set counts only when latest.json names it,
and that is written after every rank has its file; so a crash at any moment leaves the old set or the new one.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedmoe.files import write_atomic
from fedmoe.models.parallel import ProcessGroup

LATEST = "latest.json"
_FILE = re.compile(r"^checkpoint-(\d{8})-rank-\d+\.safetensors$")
_KEY = "fedmoe"


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another run."""


@dataclass(frozen=True)
class State:
    """What one rank keeps: named arrays and JSON objects."""

    arrays: Mapping[str, NDArray[np.generic]]
    values: Mapping[str, Mapping[str, object]]


def save_state(folder: Path, state: State, group: ProcessGroup) -> Path:
    """Write this rank's state as part of a new set and make the set the newest; all ranks must call it."""
    folder.mkdir(parents=True, exist_ok=True)
    serial = group.number(_newest(folder)[0] + 1 if (folder / LATEST).exists() else 1)
    file = _file(folder, serial, group.rank)
    tensors = {name: np.ascontiguousarray(array) for name, array in state.arrays.items()}
    write_atomic(file, save(tensors, {_KEY: json.dumps(dict(state.values))}))
    group.barrier()
    if group.rank == 0:
        write_atomic(folder / LATEST, json.dumps({"serial": serial, "world_size": group.world_size}).encode())
        for old in folder.iterdir():
            match = _FILE.match(old.name)
            # A process that was killed while it wrote leaves its temporary file behind.
            if (match and int(match[1]) != serial) or old.name.startswith(".checkpoint-"):
                old.unlink()
    group.barrier()
    return file


def load_state(folder: Path, group: ProcessGroup) -> State:
    """This rank's part of the newest set; raises CheckpointError when there is none, or for another number of ranks."""
    serial, world_size = _newest(folder)
    if world_size != group.world_size:
        raise CheckpointError(
            f"{folder} was saved by {world_size} processes, this run has {group.world_size}; start as many again"
        )
    file = _file(folder, serial, group.rank)
    try:
        data = file.read_bytes()
        arrays = load(data)
        length = struct.unpack("<Q", data[:8])[0]
        values = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error
    return State(arrays, values)


def has_state(folder: Path) -> bool:
    """Whether a complete set was ever saved in `folder`."""
    return (folder / LATEST).is_file()


def _newest(folder: Path) -> tuple[int, int]:
    file = folder / LATEST
    try:
        record = json.loads(file.read_text("utf-8"))
        return int(record["serial"]), int(record["world_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is missing or damaged: {error}") from error


def _file(folder: Path, serial: int, rank: int) -> Path:
    return folder / f"checkpoint-{serial:08d}-rank-{rank}.safetensors"
