"""The statistics of a worker's data, kept in its folder, so that the same data are not looked at twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from fedmoe import __version__
from fedmoe.datasets.packing import Block
from fedmoe.files import write_atomic
from fedmoe.models.base import LoadedBase
from fedmoe.wire.messages import StatisticsKind

_log = structlog.get_logger("fedmoe.worker")
_KINDS: tuple[StatisticsKind, ...] = ("prompts", "moments")


def statistics_key(base: LoadedBase, blocks: Sequence[Block], targets: Sequence[str] | str) -> str:
    """Names what statistics follow from: base model and its precision, data, adapted modules, and this code."""
    made_of = [__version__, base.identity.weights_hash, str(base.dtype), targets]
    key = hashlib.sha256(json.dumps(made_of).encode())
    for block in blocks:
        for array in (block.input_ids, block.labels, block.segment_ids):
            key.update(array.tobytes())
    return key.hexdigest()[:32]


def read_kept(folder: Path, key: str) -> dict[StatisticsKind, bytes]:
    """What was kept under this key, by kind; empty unless all of it is there, can be read and is undamaged."""
    found: dict[StatisticsKind, bytes] = {}
    for kind in _KINDS:
        for file in folder.glob(f"{kind}-{key}-*.safetensors"):
            try:
                body = file.read_bytes()
            except OSError as error:
                _log.warning("kept_statistics_unreadable", file=str(file), reason=str(error))
                continue
            if file.name == _name(kind, key, body):
                found[kind] = body
            else:
                _log.warning("kept_statistics_damaged", file=str(file))
    return found if len(found) == len(_KINDS) else {}


def keep(folder: Path, key: str, bodies: Mapping[StatisticsKind, bytes]) -> None:
    """Keep these and no others; a disk that takes none is logged, since training does not need them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        for kind, body in bodies.items():
            write_atomic(folder / _name(kind, key, body), body)
    except OSError as error:
        _log.warning("statistics_not_kept", reason=str(error))


def _name(kind: StatisticsKind, key: str, body: bytes) -> str:
    return f"{kind}-{key}-{hashlib.sha256(body).hexdigest()[:32]}.safetensors"
