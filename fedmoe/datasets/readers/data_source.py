"""Data sources: one file, a folder of files, or a data set of a hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedmoe.datasets.readers.common import DataError, DataRows, ReadOptions
from fedmoe.datasets.readers.data_file import is_data_name, read_file
from fedmoe.datasets.readers.folders import files_of_folder

_ID = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<config>[\w][\w.-]*))?(?:@(?P<revision>[\w./-]+))?(?::(?P<split>\w+))?"
)


@dataclass(frozen=True)
class DataSource:
    """The data files behind a name, in a fixed order; `folder` is None for a single file.

    `options.unread` fills while rows are read: columns of Parquet and Arrow that were there and not asked for.
    `left_out` says which files and splits are not read, a sentence each.
    """

    name: str
    files: tuple[Path, ...]
    folder: Path | None = None
    left_out: tuple[str, ...] = ()
    options: ReadOptions = field(default_factory=ReadOptions)

    def rows(self) -> DataRows:
        """The rows of all files in order; of several files each row carries its file's name.

        Raises `DataError` as `read_file` does; a part of a folder may be without rows, not the whole.
        """
        return read_file(self.files[0], self.options) if self.folder is None else self._rows_of_files()

    def _rows_of_files(self) -> DataRows:
        empty = True
        for path in self.files:
            name = self.name_inside(path)
            for row in read_file(path, self.options, may_be_empty=True):
                empty = False
                yield replace(row, file=name)
        if empty:
            raise DataError(f"{self.name}: not one of {len(self.files):,} files holds a row; write at least one row")

    def name_inside(self, path: Path) -> str:
        """The file's name inside the folder, with `/` on every system."""
        if self.folder is None or not path.is_relative_to(self.folder):
            return path.name
        return path.relative_to(self.folder).as_posix()

    def fingerprint(self) -> str:
        """SHA-256 of the content in hexadecimal: of a file its bytes, of a folder its files' names and digests."""
        if self.folder is None:
            return file_sha256(self.files[0])
        lines = "".join(f"{file_sha256(path)}  {self.name_inside(path)}\n" for path in self.files)
        return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def open_source(name: str | Path, columns: Collection[str] | None = None) -> DataSource:
    """The source behind a file's or folder's path, `FOLDER:split`, or an id of a hub.

    A hub id is `owner/name[/config][@revision][:split]`. `columns` are those read of Parquet and Arrow (None: all).
    Raises `DataError` if there is nothing to read.
    """
    text, path, options = str(name), Path(name), ReadOptions(columns)
    folder, split = path, None
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a folder above that may not be entered, a name that is too long
        raise DataError(
            f"{text[:200]}: cannot be looked at: {error.strerror}; check the path and its permissions"
        ) from None
    if not exists:
        before, colon, after = text.rpartition(":")
        if colon and Path(before).is_dir():
            folder, split, is_folder = Path(before), after, True
        elif (hub_id := parse_hub_id(text)) is not None:
            files, left_out = fetch(hub_id)
            return DataSource(text, files, files[0].parent, left_out, options)
    if is_folder:
        files, left_out = files_of_folder(folder, split)
        return DataSource(text, files, folder, left_out, options)
    source = DataSource(text, (path,), options=options)
    source.rows()  # what is refused without reading is refused now
    return source


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error


@dataclass(frozen=True, slots=True)
class HubId:
    """`owner/name`, `owner/name/config`, with `@revision` and `:split` behind it."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None


def parse_hub_id(text: str) -> HubId | None:
    """The parts of a hub id; None for a data file's name, or a path below a folder that exists."""
    match = _ID.fullmatch(text)
    if match is None or is_data_name(text) or Path(text).parts[0] in (".", "..") or Path(text).parent.exists():
        return None
    return HubId(match["name"], match["config"], match["revision"], match["split"])


def fetch(hub_id: HubId) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The Arrow files that the library `datasets` (extra `fedmoe[hub]`) keeps of one split, and what is left out."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise DataError(
            f"{hub_id.name}: no such file or folder here; to fetch it from a hub: pip install 'fedmoe[hub]'"
        ) from error
    try:
        loaded = load_dataset(hub_id.name, name=hub_id.config, revision=hub_id.revision)
        splits = {str(name): [str(file["filename"]) for file in data.cache_files] for name, data in loaded.items()}
    except Exception as error:  # the network's, the hub's and the builder's errors have no common class
        first = str(error).strip().partition("\n")[0][:300]
        raise DataError(
            f"{hub_id.name}: no such file or folder here, and not had from the hub: {type(error).__name__}: {first}; "
            "check the name, the network, and HF_TOKEN if it is private"
        ) from error
    split = _split(hub_id, splits)
    others = tuple(f"{name}: not trained on, beside {split}" for name in splits if name != split)
    if not splits[split]:
        raise DataError(f"{hub_id.name}: `datasets` keeps it in memory; unset HF_DATASETS_IN_MEMORY_MAX_SIZE")
    return tuple(Path(file) for file in splits[split]), others


def _split(hub_id: HubId, splits: Mapping[str, object]) -> str:
    if hub_id.split is not None:
        if hub_id.split not in splits:
            raise DataError(f"{hub_id.name}: no split {hub_id.split!r}; there is {', '.join(splits)}")
        return hub_id.split
    if "train" in splits:
        return "train"
    names = list(splits)
    base = f"{hub_id.name}/{hub_id.config}" if hub_id.config else hub_id.name
    base += f"@{hub_id.revision}" if hub_id.revision else ""
    raise DataError(f"{hub_id.name}: no split called train, but {', '.join(names)}; name one: {base}:{names[0]}")
