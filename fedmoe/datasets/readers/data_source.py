"""Where rows come from: one data file, a folder of them, or a data set of a hub."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedmoe.datasets.readers.folders import files_of_folder
from fedmoe.datasets.readers.hub import fetch, parse_hub_id
from fedmoe.datasets.readers.lines import MAX_ROW_BYTES, BadRow, DataError, Reading, Row, Rows
from fedmoe.datasets.readers.rows import read_file


@dataclass(frozen=True)
class Source:
    """The data files behind a name, in a fixed order; `folder` is None for a single file.

    `unread` fills while rows are read: columns of Parquet and Arrow that were there and not asked for. `left_out` says
    which files and splits are not read, a sentence each.
    """

    name: str
    files: tuple[Path, ...]
    folder: Path | None = None
    left_out: tuple[str, ...] = ()
    columns: Collection[str] | None = None
    max_row_bytes: int = MAX_ROW_BYTES
    unread: set[str] = field(default_factory=set)

    def rows(self) -> Iterator[Row | BadRow]:
        """The rows of all files in order; of several files each row carries its file's name.

        Raises `DataError` as `read_rows` does; a part of a folder may be without rows, not the whole.
        """
        reading = Reading(self.columns, self.max_row_bytes, self.unread)
        if self.folder is None:
            return read_file(self.files[0], reading)
        return self._rows_of_files(reading)

    def _rows_of_files(self, reading: Reading) -> Rows:
        empty = True
        for path in self.files:
            name = self.name_inside(path)
            for row in read_file(path, reading, may_be_empty=True):
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


def open_source(name: str | Path, columns: Collection[str] | None = None, max_row_bytes: int = MAX_ROW_BYTES) -> Source:
    """The source behind a file's or folder's path, `FOLDER:split`, or an id of a hub.

    A hub id is `owner/name[/config][@revision][:split]`. `columns` are those read of Parquet and Arrow (None: all).
    Raises `DataError` if there is nothing to read.
    """
    text = str(name)
    path = Path(name)
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:  # a folder above that may not be entered, a name that is too long
        raise DataError(
            f"{text[:200]}: cannot be looked at: {error.strerror}; check the path and its permissions"
        ) from None
    if is_folder:
        return _folder(text, path, None, columns, max_row_bytes)
    if not exists:
        before, colon, split = text.rpartition(":")
        if colon and Path(before).is_dir():
            return _folder(text, Path(before), split, columns, max_row_bytes)
        if (hub_id := parse_hub_id(text)) is not None:
            files, left_out = fetch(hub_id)
            return Source(text, files, files[0].parent, left_out, columns, max_row_bytes)
    source = Source(text, (path,), None, (), columns, max_row_bytes)
    source.rows()  # what is refused without reading is refused now
    return source


def _folder(name: str, folder: Path, split: str | None, columns: Collection[str] | None, max_row_bytes: int) -> Source:
    found = files_of_folder(folder, split)
    return Source(name, found.files, folder, found.left_out, columns, max_row_bytes)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; check its permissions") from error
