"""A worker's checkpoint on disk: one safetensors file per rank and one small JSON file that names the newest set.

    latest.json                        {"serial": 3, "world_size": 2}: the commit point
    checkpoint-00000003-rank-0-<sha256>.safetensors   tensors, and one JSON object in the header's metadata

Every file is written under a temporary name, made durable and renamed. A set counts only when latest.json names it,
and that is written after every rank has its file; so a crash at any moment leaves the old set or the new one. The set
before the newest is kept: a file whose bytes are not those its name promises is never loaded, the older set is.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedmoe.models.parallel import ProcessGroup
from fedmoe.runtime.files import write_atomic

LATEST = "latest.json"
# Without a hash: of a version before hashes were kept.
_FILE = re.compile(r"^checkpoint-(\d{8})-rank-(\d+)(?:-([0-9a-f]{32}))?\.safetensors$")
_KEY = "fedmoe"
_log = structlog.get_logger("fedmoe.worker")


class WorkerCheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged or of another run."""


@dataclass(frozen=True)
class WorkerState:
    """The content of one rank's checkpoint file: named arrays and JSON objects."""

    arrays: Mapping[str, NDArray[np.generic]]
    values: Mapping[str, Mapping[str, object]]


def save_state(folder: Path, state: WorkerState, group: ProcessGroup) -> Path:
    """Write this rank's state as part of a new set and make the set the newest; all ranks must call it."""
    folder.mkdir(parents=True, exist_ok=True)
    serial = group.number(_newest(folder)[0] + 1 if (folder / LATEST).exists() else 1)
    tensors = {name: np.ascontiguousarray(array) for name, array in state.arrays.items()}
    data = save(tensors, {_KEY: json.dumps(dict(state.values))})
    for leftover in _files(folder, serial, group.rank):
        leftover.unlink()  # of a save that was killed before it counted
    file = folder / f"checkpoint-{serial:08d}-rank-{group.rank}-{_hash(data)}.safetensors"
    write_atomic(file, data)
    group.barrier()
    if group.rank == 0:
        write_atomic(folder / LATEST, json.dumps({"serial": serial, "world_size": group.world_size}).encode())
        for old in folder.iterdir():
            match = _FILE.match(old.name)
            # A process that was killed while it wrote leaves its temporary file behind.
            if (match and int(match[1]) not in (serial, serial - 1)) or old.name.startswith(".checkpoint-"):
                old.unlink()
    group.barrier()
    return file


def load_state(folder: Path, group: ProcessGroup) -> WorkerState:
    """This rank's part of the newest set that is whole on all ranks, which call it together.

    Where a file of the newest is damaged it is logged, and the set before is taken. Raises WorkerCheckpointError when
    there is none, none is whole, or another number of ranks saved it.
    """
    newest, world_size = _newest(folder)
    if world_size != group.world_size:
        raise WorkerCheckpointError(
            f"{folder} was saved by {world_size} processes, this run has {group.world_size}; start as many again"
        )
    first: WorkerCheckpointError | None = None
    for serial in (newest, newest - 1):
        state: WorkerState | None = None
        try:
            state = _read(folder, serial, group.rank)
        except WorkerCheckpointError as error:
            first = first or error
        damaged = state is None
        if not (group.any_flag(damaged) if group.world_size > 1 else damaged):
            assert state is not None
            if serial != newest:
                _log.warning("older_checkpoint", reason=str(first), then="the one before it is taken")
            return state
    raise WorkerCheckpointError(
        f"{first or 'another process of this group found damage; its message says more'}, and no older checkpoint is "
        f"whole. Move {folder} away to begin anew under the same identity, or bring back a copy of it"
    )


def peek_values(folder: Path, rank: int) -> Mapping[str, Mapping[str, object]]:
    """The JSON objects that `load_state` would give this rank, as far as it alone can tell.

    Raises WorkerCheckpointError where no set is whole.
    """
    newest, _ = _newest(folder)
    try:
        return _read(folder, newest, rank).values
    except WorkerCheckpointError:
        return _read(folder, newest - 1, rank).values


def _read(folder: Path, serial: int, rank: int) -> WorkerState:
    """A file whose bytes have the hash in its name; raises WorkerCheckpointError otherwise, naming it."""
    file = next(iter(_files(folder, serial, rank)), folder / f"checkpoint-{serial:08d}-rank-{rank}-*.safetensors")
    try:
        data = file.read_bytes()
        match = _FILE.match(file.name)
        if match and match[3] and match[3] != _hash(data):
            raise ValueError("its bytes are not those that were saved")
        arrays = load(data)
        length = struct.unpack("<Q", data[:8])[0]
        values = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_KEY])
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise WorkerCheckpointError(f"{file} is missing or damaged: {error}") from error
    return WorkerState(arrays, values)


def has_state(folder: Path) -> bool:
    """Whether a complete set was ever saved in `folder`."""
    return (folder / LATEST).is_file()


def _newest(folder: Path) -> tuple[int, int]:
    file = folder / LATEST
    try:
        record = json.loads(file.read_text("utf-8"))
        return int(record["serial"]), int(record["world_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkerCheckpointError(
            f"{file} is missing or damaged: {error}. Move {folder} away to begin anew under the same identity"
        ) from error


def _files(folder: Path, serial: int, rank: int) -> list[Path]:
    """This rank's file of a set: one, or none."""
    return sorted(folder.glob(f"checkpoint-{serial:08d}-rank-{rank}[-.]*safetensors"))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
