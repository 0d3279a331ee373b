"""Checkpoints of an arena run: written atomically, resumed bit for bit; all but the newest few are deleted.

    checkpoints/checkpoint_20260131_120000/      named by the time in UTC, always later than the one before
        manifest.json                            sha256 and size of every other file
        config.json, performance_metrics.json    plain, for people
        state.json.gz                            everything that is JSON: counters, baselines, ratings, layouts
        arrays/NAME.safetensors                  optimizer moments and the like, see `packed_array`
        adapters/NAME/                           the newest version of each adapter, as a PEFT folder
        adapters/NAME@VERSION.safetensors        older versions (and newest ones PEFT's format would round)
        *.gz, logs/*.gz                          copies of the result files and logs

A save writes into a hidden folder, makes every file durable and renames the folder, so that a process killed at any
moment leaves the checkpoints before untouched.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import structlog

from fedmoe.arena.run.adapter_files import CheckpointError, pack, read_adapter, unpack, write_adapters
from fedmoe.lora.adapter import Adapter, FloatArray
from fedmoe.runtime import failpoints
from fedmoe.runtime.files import fsync_folder
from fedmoe.runtime.placement import require_space

Json = Mapping[str, object]

MANIFEST = "manifest.json"
_STATE = "state.json.gz"
_FORMAT = 1
_NAME = "checkpoint_%Y%m%d_%H%M%S"
_ARRAY_NAME = re.compile(r"[A-Za-z0-9][\w.@-]*(/[A-Za-z0-9][\w.@-]*)*", re.ASCII)
_log = structlog.get_logger("fedmoe.arena")


@dataclass(frozen=True, eq=False)
class ArenaState:
    """What a run needs to go on as if it had never stopped.

    `arrays`: float32 by name, with `/` between parts (`solver/first_moment`). `adapters`: by `NAME@VERSION`. `state`:
    everything else, JSON types only (counters, baselines, ratings, mode, opponents, lineage, admission, tuning).
    `records_bytes`: the length of metrics.jsonl in bytes, to which it is cut on resume.
    """

    iteration: int
    config: Json
    state: Json = field(default_factory=dict)
    arrays: Mapping[str, FloatArray] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    records_bytes: int = 0

    @property
    def size(self) -> int:
        """About how many bytes a checkpoint takes at most, without logs."""
        weights = (adapter.flat for adapter in self.adapters.values())
        return sum(array.nbytes for array in (*self.arrays.values(), *weights))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read: where it lies, and what it holds."""

    path: Path
    state: ArenaState


def config_digest(config: Json) -> str:
    """The sha256 of a configuration, independent of the order of its keys, as 64 hex digits."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoints(folder: Path) -> list[Path]:
    """All checkpoint folders by age, the oldest first; other names are not looked at."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if _time_of(path) is not None and path.is_dir())


def _time_of(path: Path) -> datetime | None:
    try:
        time = datetime.strptime(path.name, _NAME).replace(tzinfo=UTC)
    except ValueError:
        return None
    return time if time.strftime(_NAME) == path.name else None


def clean(folder: Path) -> None:
    """Remove what killed saves left behind; to be called at start by the process that owns the folder."""
    for path in folder.glob(".checkpoint_*"):
        if path.is_dir():
            shutil.rmtree(path)
            _log.info("checkpoint_leftover_removed", name=path.name)


def prune(folder: Path, keep: int, in_use: Path) -> list[Path]:
    """Remove all but the newest `keep` (at least 1) checkpoints, never `in_use`; returns what was removed."""
    removed = [path for path in checkpoints(folder)[:-keep] if path.name != in_use.name]
    for path in removed:
        # Renamed first: a process killed in between must not leave half a checkpoint under its name.
        hidden = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
        path.rename(hidden)
        shutil.rmtree(hidden)
    return removed


def save(
    folder: Path, state: ArenaState, *, metrics: Json, base_model: str, now: float, copies: Mapping[str, Path]
) -> Path:
    """Write a checkpoint into `folder` and return its path; it is durable then.

    `metrics` becomes performance_metrics.json. `copies`: name in the checkpoint (without `.gz`) -> file to copy; one
    that is not there is left out with a line in the log. `now` is in seconds since 1970. Raises CheckpointError for
    a state that cannot be written, OSError when the disk cannot take it (and then nothing is left behind).
    """
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, state.size + sum(path.stat().st_size for path in copies.values() if path.exists()))
    path = folder / _next_name(folder, now)
    temporary = folder / f".{path.name}-{secrets.token_hex(4)}"
    temporary.mkdir(mode=0o700)
    try:
        writer = _CheckpointWriter(temporary)
        _write_all(writer, state, metrics, base_model)
        for name, source in copies.items():
            writer.copy(name, source)
        writer.finish()
        failpoints.reached("checkpoint.written")
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    failpoints.reached("checkpoint.renamed")
    fsync_folder(folder)
    return path


def _next_name(folder: Path, now: float) -> str:
    """The name for a new checkpoint; later than every other even when the clock was set back."""
    time = datetime.fromtimestamp(int(now), UTC)
    times = [other for path in checkpoints(folder)[-1:] if (other := _time_of(path))]
    return max([time, *(other + timedelta(seconds=1) for other in times)]).strftime(_NAME)


def _write_all(writer: _CheckpointWriter, state: ArenaState, metrics: Json, base_model: str) -> None:
    for name, array in state.arrays.items():
        if not _ARRAY_NAME.fullmatch(name) or array.dtype != np.float32:
            raise CheckpointError(f"array {name!r} of {array.dtype}: plain names and float32 are needed")
        writer.write(f"arrays/{name}.safetensors", pack(array))
    index, layouts = write_adapters(state.adapters, base_model, writer.write)
    values: dict[str, object] = {
        "format": _FORMAT,
        "iteration": state.iteration,
        "records_bytes": state.records_bytes,
        "arrays": list(state.arrays),
        "adapters": index,
        "layouts": layouts,
        "state": _plain(state.state, "state"),
    }
    writer.write(_STATE, gzip.compress(json.dumps(values, separators=(",", ":")).encode(), 6, mtime=0))
    writer.write("config.json", _pretty(_plain(state.config, "config")))
    writer.write("performance_metrics.json", _pretty(_plain(metrics, "metrics")))


def _plain(value: object, where: str) -> object:
    """The value as JSON would give it back; raises CheckpointError naming the place of anything else.

    Tuples become lists. Infinities and NaN are kept, since Python reads back what it writes for them.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} is of type {type(value).__name__}, which JSON has no word for")
    for key in value:
        if not isinstance(key, str):
            raise CheckpointError(f"{where} has the key {key!r}, which JSON would turn into text; make it text first")
    return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}


def _pretty(values: object) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


class _CheckpointWriter:
    """Writes files below a folder, each durable and hashed, and at the end the manifest of them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, dict[str, object]] = {}

    def write(self, name: str, data: bytes) -> None:
        """Write one file."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        failpoints.reached("checkpoint.file_written")

    def copy(self, name: str, source: Path) -> None:
        """Compress a copy of `source` as `NAME.gz`."""
        try:
            content = source.read_bytes()
        except FileNotFoundError:
            _log.warning("checkpoint_copy_left_out", file=str(source), reason="it is not there")
            return
        self.write(f"{name}.gz", gzip.compress(content, 6, mtime=0))

    def finish(self) -> None:
        """Write the manifest and make all names durable."""
        self.write(MANIFEST, _pretty({"format": _FORMAT, "files": self._files}))
        for folder, _, _ in os.walk(self._folder, topdown=False):
            fsync_folder(Path(folder))


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, or None if there never was one; damaged ones are skipped, logged with the reason.

    Raises CheckpointError when there are checkpoints and none of them is whole.
    """
    skipped: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            return Checkpoint(path, load(path))
        except CheckpointError as error:
            _log.warning("checkpoint_skipped", name=path.name, reason=str(error))
            skipped.append(str(error))
    if skipped:
        raise CheckpointError(f"no checkpoint in {folder} is whole: {'; '.join(skipped)}; start in a new run folder")
    return None


def load(path: Path) -> ArenaState:
    """The state in a checkpoint, after every file of it has been compared with its hash; raises CheckpointError."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT:
            raise CheckpointError(f"{path.name} has format {manifest['format']!r}, this version reads {_FORMAT}")
        expected = {str(name): (str(entry["sha256"]), int(entry["bytes"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: {MANIFEST} is missing or damaged: {error!r}") from error
    reader = _CheckpointReader(path, expected)
    try:
        state = _state(reader)
        reader.check_others()
    except (ValueError, KeyError, TypeError, AttributeError, OSError, EOFError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error!r}") from error
    return state


class _CheckpointReader:
    """Reads the files of a checkpoint, each compared with its hash."""

    def __init__(self, folder: Path, expected: Mapping[str, tuple[str, int]]) -> None:
        self._folder = folder
        self._expected = expected
        self._seen: set[str] = set()

    def read(self, name: str) -> bytes:
        """The content of a file."""
        if name not in self._expected:
            raise CheckpointError(f"{self._folder.name}: {name} is not in {MANIFEST}")
        try:
            data = (self._folder / name).read_bytes()
        except OSError as error:
            raise CheckpointError(f"{self._folder.name}: {name} cannot be read: {error.strerror}") from error
        got, (sha256, size) = hashlib.sha256(data).hexdigest(), self._expected[name]
        if (got, len(data)) != (sha256, size):
            raise CheckpointError(
                f"{self._folder.name}: {name} is damaged: expected {size} bytes with sha256 {sha256[:12]}..., got "
                f"{len(data)} with {got[:12]}..."
            )
        self._seen.add(name)
        return data

    def check_others(self) -> None:
        """Compare what was not read with its hash: a copy of a log may be damaged too."""
        for name in sorted(self._expected.keys() - self._seen):
            self.read(name)


def _state(reader: _CheckpointReader) -> ArenaState:
    values = json.loads(gzip.decompress(reader.read(_STATE)))
    layouts = values["layouts"]
    adapters = {key: read_adapter(key, entry, layouts, reader.read) for key, entry in values["adapters"].items()}
    return ArenaState(
        iteration=values["iteration"],
        config=json.loads(reader.read("config.json")),
        state=values["state"],
        arrays={name: unpack(reader.read(f"arrays/{name}.safetensors")) for name in values["arrays"]},
        adapters=adapters,
        records_bytes=values["records_bytes"],
    )
