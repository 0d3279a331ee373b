"""Selects the data files of a folder: kinds, order, splits, and what is left out and why."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fedmoe.datasets.readers.common import UTF8_BOM, DataError
from fedmoe.datasets.readers.compressed import bare_name, head
from fedmoe.datasets.readers.data_file import is_data_name

#: JSON files that describe data, models or packages, and hold no rows.
METADATA = frozenset(
    (
        *("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "metadata.json", "config.json"),
        *("package.json", "package-lock.json", "tsconfig.json", "stats.json", "manifest.json", "croissant.json"),
    )
)
MAX_FILES = 100_000
NAMES_SHOWN = 5
_TRAIN = r"(?P<train>train(?:ing)?(?:[-_]?set)?)"
_HELD_OUT = (
    r"(?:test|dev|val|valid|eval)(?:[-_]?set)?|tests|testing|evals|evaluation|validation|validate|h[eo]ld[-_]?out"
)
# Words end where letters do, or where a small one meets a capital (`myTest`).
_EDGE = r"(?<=(?-i:[a-z]))(?=(?-i:[A-Z]))"
_SPLIT = re.compile(rf"(?:(?<![a-z])|{_EDGE})(?:{_TRAIN}|{_HELD_OUT})(?:(?![a-z])|{_EDGE})", re.IGNORECASE)
_SHARD = re.compile(r"-[0-9]{5}-of-[0-9]{5}$")
_PART = re.compile(r"[-_.](?:(?:part|shard)[-_.]?)?[0-9]+(?:-of-[0-9]+)?$", re.IGNORECASE)


@dataclass(frozen=True)
class _DataFile:
    """One data file: its path inside the folder, and the split that its names tell."""

    path: PurePosixPath
    split: str | None
    held_out: bool

    @property
    def is_shard(self) -> bool:
        return _SHARD.search(PurePosixPath(self.path.name).stem) is not None


def files_of_folder(folder: Path, split: str | None = None) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The data files below a folder in natural order (`part-2` before `part-10`); of several splits the training one.

    With a sentence for each kind of thing that is not read.

    `split` chooses one by its name. Raises `DataError` if there is no data, or if the choice is not clear.
    """
    notes: list[str] = []
    paths = list(_data_files(folder, notes))
    if not paths:
        there = "it empty" if not os.listdir(folder) else "only hidden names and empty folders"
        if notes:
            there = notes[0].partition(": no rows")[0] + "; read are .jsonl, .json, .csv, .tsv, .parquet and .arrow"
        raise DataError(f"{folder}: no data file in this folder; found {there}")
    names = {str(path) for path in paths}
    for path in paths:
        bare = str(path.with_name(bare_name(path.name)))
        if bare != str(path) and bare in names:  # a file beside its own compressed copy would be learned twice
            raise DataError(f"{folder}: holds {bare} and {path}, the same rows twice; give one file: {folder / bare}")
    files = [_classified(path) for path in sorted(paths, key=natural_key)]
    if split is None:
        chosen = _training(folder, files, notes)
    elif not (chosen := [file for file in files if file.split == split]):
        splits = ", ".join(sorted({file.split for file in files if file.split}))
        raise DataError(f"{folder}: no split {split!r}; there is {splits or 'no file with a split in its name'}")
    _check_configurations(folder, chosen)
    return tuple(folder / file.path for file in chosen), tuple(notes)


def natural_key(path: PurePosixPath | str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts numbers inside names by their value."""
    parts = re.split(r"([0-9]+)", str(path))
    return tuple((0, int(part), "") if index % 2 else (1, 0, part) for index, part in enumerate(parts))


def _data_files(folder: Path, notes: list[str]) -> Iterator[PurePosixPath]:
    others: list[str] = []
    for inner, names in _walk(folder):
        saved = _saved_to_disk(folder / inner) if "state.json" in names else None
        if saved is not None:
            yield from (inner / name for name in saved)
            others += [str(inner / name) for name in names if name not in saved and is_data_name(name)]
            continue
        cache = "dataset_info.json" in names
        for name in names:
            if _is_data(folder / inner / name) and not (cache and name.startswith("cache-")):
                yield inner / name
            else:
                others.append(str(inner / name))
    if others:
        notes.append(f"{_some(others)}: no rows, left out")


def _walk(folder: Path) -> Iterator[tuple[PurePosixPath, list[str]]]:
    """Every folder below, with its files; names that start with `.` or `_` are passed over, loops of links too."""
    seen: set[str] = set()
    waiting = [PurePosixPath()]
    count = 0
    while waiting:
        inner = waiting.pop()
        real = os.path.realpath(folder / inner)
        if real in seen:
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(folder / inner), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{folder / inner}: cannot be listed: {error.strerror}; check its permissions") from error
        entries = [entry for entry in entries if not entry.name.startswith((".", "_"))]
        count += len(entries)
        if count > MAX_FILES:
            raise DataError(f"{folder}: more than {MAX_FILES:,} files below it; give the folder that holds the data")
        folders = [entry.name for entry in entries if os.path.isdir(entry)]  # False for a link to itself
        waiting += [inner / name for name in folders]
        yield inner, [entry.name for entry in entries if entry.name not in folders]


def _saved_to_disk(folder: Path) -> list[str] | None:
    """The files that `save_to_disk` wrote, in its order; None if state.json is of something else."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(item["filename"]) for item in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    missing = [name for name in names if PurePosixPath(name).name != name or not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder}: state.json names {_some(missing)}, which is not there; copy the folder anew, whole")
    return names


def _is_data(path: Path) -> bool:
    if path.name.lower() in METADATA or not is_data_name(path.name) or (path.is_file() and not path.stat().st_size):
        return False
    if PurePosixPath(bare_name(path.name)).suffix.lower() != ".json":
        return True
    if not path.is_file():
        return False
    # An array or lines of objects, and not one object over several lines.
    start = head(path).removeprefix(UTF8_BOM).lstrip()
    first, newline, _ = start.partition(b"\n")
    return start.startswith(b"[") or (start.startswith(b"{") and (first.rstrip().endswith(b"}") or not newline))


def _classified(path: PurePosixPath) -> _DataFile:
    stem = PurePosixPath(bare_name(path.name)).stem
    for part in (*path.parts[:-1], stem):
        if match := _SPLIT.search(part):
            rest = _SHARD.sub("", part[match.start() :])
            while (shorter := _PART.sub("", rest)) != rest:
                rest = shorter
            return _DataFile(path, rest, match["train"] is None)
    return _DataFile(path, None, held_out=False)


def _training(folder: Path, files: Sequence[_DataFile], notes: list[str]) -> list[_DataFile]:
    """What is trained on: never what is named as a test, unless it is chosen by name."""
    held_out = [file for file in files if file.held_out]
    chosen = list(files)
    if held_out:
        train = [file for file in files if file.split and not file.held_out]
        chosen = train or [file for file in files if not file.split]
    splits = sorted({file.split for file in chosen if file.split and file.is_shard})
    if not chosen:
        there = sorted({str(file.split) for file in held_out})
        raise DataError(
            f"{folder}: holds only {_some(there)}, nothing to train on; to use it, name it: {folder}:{there[0]}"
        )
    if len(splits) > 1:
        raise DataError(f"{folder}: holds several training splits ({_some(splits)}); name one: {folder}:{splits[0]}")
    if left_out := [file for file in files if file not in chosen]:
        names = sorted({file.split or str(file.path) for file in left_out})
        beside = splits[0] if splits else chosen[0].split or chosen[0].path
        notes.append(f"{_some(names)}: not trained on, beside {beside}")
    return chosen


def _check_configurations(folder: Path, chosen: Sequence[_DataFile]) -> None:
    """Refuse shards of one name in several folders: several data sets, often the same rows in other words."""
    places: dict[str, set[str]] = {}
    for file in chosen:
        if file.is_shard:
            places.setdefault(file.path.name, set()).add(str(file.path.parent))
    several = max(places.values(), key=len, default=set())
    if len(several) > 1:
        names = sorted(several)
        raise DataError(f"{folder}: holds several data sets ({_some(names)}); give one: {folder / names[0]}")


def _some(names: Sequence[str]) -> str:
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
