"""Rows of a Parquet file, through pyarrow, which comes with the extra `fedmoe[worker]`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedmoe.datasets.readers.arrow_values import ROWS_AT_ONCE, rows_of_batch, wanted_columns
from fedmoe.datasets.readers.lines import MAX_COLUMNS, DataError, Reading, Row, Rows

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

MAX_ROW_GROUP_BYTES = 4 * 1024**3
MAX_FOOTER_ITEMS = 1_000_000


def read_parquet(path: Path, reading: Reading) -> Rows:
    """The rows in file order, of the wanted columns; `DataError` names the row after which a file cannot be decoded."""
    pyarrow_errors, file = _open(path)
    number = 0
    try:
        wanted = wanted_columns(path, file.schema_arrow.names, reading)
        _check_sizes(path, file, set(wanted))
        if not wanted:
            yield from (Row(line, {}) for line in range(1, file.metadata.num_rows + 1))
            return
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=wanted, use_threads=False):
            # A column called `a.b` comes along with a wanted `a`.
            yield from rows_of_batch(batch.select(wanted), number + 1)
            number += batch.num_rows
    except DataError:
        raise
    except pyarrow_errors as error:
        raise DataError(f"{path}: cannot be decoded after row {number:,}: {error}; write the file anew") from error
    finally:
        file.close()


def _open(path: Path) -> tuple[tuple[type[Exception], ...], ParquetFile]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow; pip install 'fedmoe[worker]', or convert it to .jsonl"
        ) from error
    errors: tuple[type[Exception], ...] = (pa.ArrowException, OSError, ValueError)
    try:
        # The limits bound what a footer that lies about its own size can make the reader allocate.
        file = pq.ParquetFile(
            path,
            thrift_string_size_limit=64 * 1024 * 1024,
            thrift_container_size_limit=MAX_FOOTER_ITEMS,
        )
    except errors as error:
        raise DataError(f"{path}: not a Parquet file: {error}; write the file anew") from error
    return errors, file


def _check_sizes(path: Path, file: ParquetFile, wanted: set[str]) -> None:
    metadata = file.metadata
    paths = (metadata.schema.column(index).path for index in range(metadata.num_columns))
    count = sum(name in wanted or name.partition(".")[0] in wanted for name in paths)
    if count > MAX_COLUMNS:
        raise DataError(f"{path}: {count:,} columns, at most {MAX_COLUMNS} are read; keep those needed")
    for index in range(metadata.num_row_groups):
        size = metadata.row_group(index).total_byte_size
        if size > MAX_ROW_GROUP_BYTES:
            raise DataError(f"{path}: row group {index} holds {size:,} bytes; write smaller row groups")
