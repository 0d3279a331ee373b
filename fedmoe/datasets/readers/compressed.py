"""Compressed files, recognised by their first bytes and not by their name, as streams of bounded memory."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from fedmoe.datasets.readers.common import DataError

HEAD_BYTES = 4096
#: What a compressed stream raises where it is damaged or cut off; `OSError` covers gzip's, bzip2's and zstd's.
STREAM_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Compression:
    """One kind: its names, the first bytes that tell it, the command that unpacks it, and the way to its content."""

    name: str
    suffixes: tuple[str, ...]
    start: re.Pattern[bytes]
    unpack: str
    open: Callable[[Path], object]


def _open_zstd(path: Path) -> io.BufferedReader:
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(
            f"{path}: reading zstd needs pyarrow; pip install 'fedmoe[worker]', or unpack it: unzstd {path.name}"
        ) from error
    raw: io.RawIOBase = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return io.BufferedReader(raw)


COMPRESSIONS = (
    Compression("gzip", (".gz", ".gzip"), re.compile(rb"\x1f\x8b"), "gunzip", gzip.GzipFile),
    Compression("bzip2", (".bz2",), re.compile(rb"BZh[1-9]1AY&SY"), "bunzip2", bz2.BZ2File),
    Compression("xz", (".xz",), re.compile(rb"\xfd7zXZ\x00"), "unxz", lzma.LZMAFile),
    Compression("zstd", (".zst", ".zstd"), re.compile(rb"\x28\xb5\x2f\xfd"), "unzstd", _open_zstd),
)


def bare_name(name: str) -> str:
    """The name without the suffix of a compression: `a.jsonl.gz` is `a.jsonl`."""
    suffixes = (suffix for compression in COMPRESSIONS for suffix in compression.suffixes)
    return next((name[: -len(suffix)] for suffix in suffixes if name.lower().endswith(suffix)), name)


def compression_of(path: Path) -> Compression | None:
    """How the file is compressed, told by its first bytes; None if it is not."""
    with path.open("rb") as file:
        start = file.read(16)
    return next((compression for compression in COMPRESSIONS if compression.start.match(start)), None)


def open_plain(path: Path) -> BinaryIO:
    """The file's content as a stream of bytes, unpacked on the way if it is compressed."""
    compression = compression_of(path)
    return path.open("rb") if compression is None else cast(BinaryIO, compression.open(path))


def head(path: Path) -> bytes:
    """The first bytes of the content, at most `HEAD_BYTES`; raises `DataError` if not even these can be had."""
    try:
        with open_plain(path) as file:
            return file.read(HEAD_BYTES)
    except STREAM_ERRORS as error:
        raise DataError(
            f"{path}: cannot be read: {reason_of(error)}; check that it is whole, and its permissions"
        ) from error


def reason_of(error: BaseException) -> str:
    """What an error says, without the path that the message already names."""
    return (error.strerror if isinstance(error, OSError) and error.strerror else str(error)) or type(error).__name__
