"""Data sources: one file, a folder of files, or a data set of a hub."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from fedmoe.datasets.readers.common import DataError, DataRows, ReadOptions
from fedmoe.datasets.readers.data_file import read_file
from fedmoe.datasets.readers.folders import files_of_folder
from fedmoe.datasets.readers.hub import fetch, parse_hub_id


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
        content = files_of_folder(folder, split)
        return DataSource(text, content.files, folder, content.left_out, options)
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
