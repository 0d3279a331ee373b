"""Reads one data file row by row in bounded memory: recognises its kind, and names what is wrong with it.

A row that cannot be read becomes a `BadRow` with its line and a reason, so that one broken line neither stops the
reader nor goes unseen. A file that cannot be read at all raises `DataError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePath

from fedmoe.datasets.readers.columnar import ARROW_MAGIC, read_arrow, read_parquet
from fedmoe.datasets.readers.common import DataError, DataRows, ReadOptions
from fedmoe.datasets.readers.compressed import STREAM_ERRORS, bare_name, compression_of, head, reason_of
from fedmoe.datasets.readers.text_rows import read_csv, read_json, read_jsonl

UTF16_BOMS = (b"\xff\xfe", b"\xfe\xff")
PARQUET_MAGIC = b"PAR1"
ZIP_MAGIC = b"PK\x03\x04"
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
PACKED = (".lz4", ".br", ".7z", ".rar", ".z", ".lzma", ".lzo", ".snappy")
COLUMNAR = (".parquet", ".arrow", ".feather")
LINES_TO_JSON = (
    'python3 -c "import json, sys; '
    "[print(json.dumps({'text': line.strip()})) for line in sys.stdin if line.strip()]\" "
)


def read_file(path: Path, options: ReadOptions, *, may_be_empty: bool = False) -> DataRows:
    """The rows of one data file in order; blank lines are skipped.

    Raises `DataError` at once if the file is missing, empty or of an unknown kind, and while reading if it turns out
    to hold no row at all (one part of many `may_be_empty`), changes, or cannot be unpacked or decoded.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path, it is relative to {Path.cwd()}")
    if not path.is_file():
        raise DataError(f"{path}: not a file; give one data file, or a folder of them")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {reason_of(error)}; check its permissions") from error
    if not start:
        raise DataError(f"{path}: the file is empty (0 bytes); write at least one row")
    if start.startswith(LFS_POINTER):
        raise DataError(f"{path}: only a pointer of Git LFS, not the data; fetch them: git lfs pull")
    reader = READERS[_kind(path, may_be_empty)]
    return _watched(path, reader(path, options), may_be_empty)


def is_data_name(name: str) -> bool:
    """Whether a file of this name is read as data, compressed or not."""
    return PurePath(bare_name(name)).suffix.lower() in READERS


def _kind(path: Path, may_be_empty: bool) -> str:
    """The suffix that tells the reader: by the content where that is sure, else by the name."""
    compression = compression_of(path)
    start = head(path)
    suffix = Path(bare_name(path.name)).suffix.lower()
    if start.startswith(PARQUET_MAGIC):
        suffix = ".parquet"
    elif start.startswith(ARROW_MAGIC):
        suffix = ".arrow"
    if suffix not in READERS or start.startswith(ZIP_MAGIC):
        raise DataError(_unknown(path, suffix, start))
    if compression is not None and suffix in COLUMNAR:
        raise DataError(
            f"{path}: {suffix} inside {compression.name}; unpack it first: {compression.unpack} {path.name}"
        )
    if not start and not may_be_empty:
        raise DataError(f"{path}: the file is empty once it is unpacked; write at least one row")
    if suffix not in COLUMNAR and start.startswith(UTF16_BOMS):
        raise DataError(f"{path}: the file is UTF-16; save it as UTF-8")
    return suffix


def _unknown(path: Path, suffix: str, start: bytes) -> str:
    if suffix in (".xlsx", ".xls", ".ods"):
        return f"{path}: a spreadsheet; save it as CSV (UTF-8, commas)"
    if suffix in PACKED:
        return f"{path}: packed in a way that is not read; unpack it first, or pack it as .gz"
    if suffix in (".tar", ".tgz") or start.startswith(ZIP_MAGIC) or start[257:262] == b"ustar":
        return f"{path}: an archive of files; unpack it and give the folder"
    if suffix == ".txt":
        return (
            f"{path}: a .txt file does not say where a row ends; if every line is a row, write it as JSON lines:\n"
            f"  {LINES_TO_JSON}< {path.name} > {path.stem}.jsonl"
        )
    what = repr(suffix) if suffix else "a name without suffix"
    rename = "" if b"\0" in start else "if it holds JSON lines, rename it to .jsonl; else "
    kinds = ", ".join(READERS)
    return f"{path}: cannot tell how to read {what}; {rename}convert it to one of {kinds}"


def _watched(path: Path, rows: DataRows, may_be_empty: bool) -> DataRows:
    """The rows; a file that breaks, changes or turns out to hold none raises `DataError`."""
    before = _stat(path)
    line = 0
    try:
        for row in rows:
            line = row.line
            yield row
    except STREAM_ERRORS as error:
        where = f"after row {line:,}" if line else "before the first row"
        raise DataError(f"{path}: cannot be read {where}: {reason_of(error)}; get the file anew, whole") from error
    if _stat(path) != before:
        raise DataError(f"{path}: the file changed while it was read; start again when it is written")
    if not line and not may_be_empty:
        raise DataError(f"{path}: the file holds no rows, only blank lines or a header; write at least one row")


def _stat(path: Path) -> tuple[int, int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (-1, 0, 0)
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)


READERS: Mapping[str, Callable[[Path, ReadOptions], DataRows]] = {
    ".jsonl": read_jsonl,
    ".ndjson": read_jsonl,
    ".jsonlines": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
    ".arrow": read_arrow,
    ".feather": read_arrow,
}
