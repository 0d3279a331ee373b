"""Rows of an Arrow file (Feather) or stream (what `datasets` writes), through pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fedmoe.datasets.readers.arrow_values import ROWS_AT_ONCE, rows_of_batch, wanted_columns
from fedmoe.datasets.readers.lines import MAX_COLUMNS, DataError, Reading, Rows

if TYPE_CHECKING:
    from pyarrow import RecordBatch

FILE_MAGIC = b"ARROW1"
OLD_FEATHER_MAGIC = b"FEA1"


def read_arrow(path: Path, reading: Reading) -> Rows:
    """The rows in file order, of the wanted columns; `DataError` names the row after which a file cannot be decoded."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(
            f"{path}: reading Arrow needs pyarrow; pip install 'fedmoe[worker]', or convert it to .jsonl"
        ) from error
    number = 0
    try:
        for batch in _batches(path, reading):
            # The file comes from outside: offsets that point anywhere must not be followed.
            batch.validate(full=True)
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                part = batch.slice(start, ROWS_AT_ONCE)
                yield from rows_of_batch(part, number + 1)
                number += part.num_rows
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be decoded as Arrow after row {number:,}: {error}; write it anew") from error


def _batches(path: Path, reading: Reading) -> Iterator[RecordBatch]:
    import pyarrow as pa

    with path.open("rb") as file:
        start = file.read(len(FILE_MAGIC))
    if start.startswith(OLD_FEATHER_MAGIC):
        raise ValueError("the old Feather version 1; write it as version 2 or as Parquet")
    whole_file = start == FILE_MAGIC
    opened = pa.ipc.open_file if whole_file else pa.ipc.open_stream
    with pa.OSFile(str(path)) as source, opened(source) as reader:
        names = reader.schema.names
    wanted = wanted_columns(path, names, reading)
    if len(wanted) > MAX_COLUMNS:
        raise DataError(f"{path}: {len(wanted):,} columns, at most {MAX_COLUMNS} are read; keep those needed")
    # Without a wanted column one is read all the same, to count the rows.
    options = pa.ipc.IpcReadOptions(included_fields=[names.index(name) for name in wanted] or [0], use_threads=False)
    with pa.OSFile(str(path)) as source, opened(source, options=options) as reader:
        if whole_file:
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index).select(wanted)
        else:
            for batch in reader:
                yield batch.select(wanted)
