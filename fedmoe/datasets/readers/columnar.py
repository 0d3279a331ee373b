"""Rows of Parquet, Arrow and Feather files, through pyarrow, which comes with the extra `fedmoe[worker]`."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmoe.datasets.readers.common import MAX_COLUMNS, BadRow, DataError, DataRow, DataRows, ReadOptions
from fedmoe.datasets.readers.text_rows import decode_json

if TYPE_CHECKING:
    from pyarrow import DataType, RecordBatch

ROWS_AT_ONCE = 256
ARROW_MAGIC = b"ARROW1"
OLD_FEATHER_MAGIC = b"FEA1"
MAX_ROW_GROUP_BYTES = 4 * 1024**3
MAX_FOOTER_ITEMS = 1_000_000
_EXTENSION_OF_JSON = "extension<arrow.json>"


def read_parquet(path: Path, options: ReadOptions) -> DataRows:
    """Yield the rows in file order, of the wanted columns; `DataError` names the row after which decoding failed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise DataError(_without_pyarrow(path, "Parquet")) from error
    errors: tuple[type[Exception], ...] = (pa.ArrowException, OSError, ValueError)
    try:
        # The limits bound what a footer that lies about its own size can make the reader allocate.
        file = pq.ParquetFile(
            path, thrift_string_size_limit=64 * 1024 * 1024, thrift_container_size_limit=MAX_FOOTER_ITEMS
        )
    except errors as error:
        raise DataError(f"{path}: not a Parquet file: {error}; write the file anew") from error
    number = 0
    try:
        columns = _wanted_columns(path, file.schema_arrow.names, options)
        metadata = file.metadata
        leaves = (metadata.schema.column(index).path for index in range(metadata.num_columns))
        _check_count(path, sum(name in columns or name.partition(".")[0] in columns for name in leaves))
        for index in range(metadata.num_row_groups):
            size = metadata.row_group(index).total_byte_size
            if size > MAX_ROW_GROUP_BYTES:
                raise DataError(f"{path}: row group {index} holds {size:,} bytes; write smaller row groups")
        if not columns:
            yield from (DataRow(line, {}) for line in range(1, metadata.num_rows + 1))
            return
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=columns, use_threads=False):
            # A column called `a.b` comes along with a wanted `a`.
            yield from _rows_of_batch(batch.select(columns), number + 1)
            number += batch.num_rows
    except DataError:
        raise
    except errors as error:
        raise DataError(f"{path}: cannot be decoded after row {number:,}: {error}; write the file anew") from error
    finally:
        file.close()


def read_arrow(path: Path, options: ReadOptions) -> DataRows:
    """As `read_parquet`, of an Arrow file (Feather) or stream (what `datasets` writes)."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise DataError(_without_pyarrow(path, "Arrow")) from error
    number = 0
    try:
        for batch in _batches(path, options):
            # The file comes from outside: offsets that point anywhere must not be followed.
            batch.validate(full=True)
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                part = batch.slice(start, ROWS_AT_ONCE)
                yield from _rows_of_batch(part, number + 1)
                number += part.num_rows
    except DataError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be decoded as Arrow after row {number:,}: {error}; write it anew") from error


def _without_pyarrow(path: Path, kind: str) -> str:
    return f"{path}: reading {kind} needs pyarrow; pip install 'fedmoe[worker]', or convert it to .jsonl"


def _batches(path: Path, options: ReadOptions) -> Iterator[RecordBatch]:
    import pyarrow as pa

    with path.open("rb") as file:
        start = file.read(len(ARROW_MAGIC))
    if start.startswith(OLD_FEATHER_MAGIC):
        raise ValueError("the old Feather version 1; write it as version 2 or as Parquet")
    open_reader = pa.ipc.open_file if start == ARROW_MAGIC else pa.ipc.open_stream
    with pa.OSFile(str(path)) as source, open_reader(source) as reader:
        names = reader.schema.names
    columns = _wanted_columns(path, names, options)
    _check_count(path, len(columns))
    # Without a wanted column one is read all the same, to count the rows.
    included = [names.index(name) for name in columns] or [0]
    read_options = pa.ipc.IpcReadOptions(included_fields=included, use_threads=False)
    with pa.OSFile(str(path)) as source, open_reader(source, options=read_options) as reader:
        if start == ARROW_MAGIC:
            yield from (reader.get_batch(index).select(columns) for index in range(reader.num_record_batches))
        else:
            yield from (batch.select(columns) for batch in reader)


def _check_count(path: Path, columns: int) -> None:
    if columns > MAX_COLUMNS:
        raise DataError(f"{path}: {columns:,} columns, at most {MAX_COLUMNS} are read; keep those needed")


def _wanted_columns(path: Path, names: Sequence[str], options: ReadOptions) -> list[str]:
    """The names to read, in the file's order; the others go to `options.unread`."""
    columns = [name for name in names if options.columns is None or name in options.columns]
    options.unread.update(set(names).difference(columns))
    if repeated := sorted({name for name in columns if columns.count(name) > 1}):
        raise DataError(f"{path}: columns named more than once: {repeated[:5]}; name each column once")
    return columns


def _rows_of_batch(batch: RecordBatch, first: int) -> DataRows:
    """The rows of a batch, numbered from `first`; one that has no value in Python is a `BadRow` naming its column.

    Nulls are not there, at any depth of a struct (its schema is the union of all rows); NaN counts as null, as pandas
    writes it. Bytes that are UTF-8 are text. Inside structs and lists, times and decimals are their text.
    """
    try:
        rows = _to_python(batch)
    except Exception:  # pyarrow raises what the column's type brings along: ValueError, OverflowError, KeyError, ...
        yield from (_one_row(batch.slice(index, 1), first + index) for index in range(batch.num_rows))
        return
    yield from (DataRow(number, fields) for number, fields in enumerate(rows, first))


def _one_row(batch: RecordBatch, number: int) -> DataRow | BadRow:
    fields: dict[str, object] = {}
    for name in batch.schema.names:
        try:
            fields |= _to_python(batch.select([name]))[0]
        except Exception as error:
            return BadRow(number, f"{name!r} ({batch.schema.field(name).type}) cannot be read: {error}")
    return DataRow(number, fields)


def _to_python(batch: RecordBatch) -> list[dict[str, object]]:
    import pyarrow as pa

    # Nanoseconds have no Python value without pandas, and time zones none without a database of them.
    kinds = [_microseconds(column.type) for column in batch.columns]
    arrays = [
        column if kind.equals(column.type) else column.cast(kind, safe=False)
        for column, kind in zip(batch.columns, kinds, strict=True)
    ]
    plain = pa.RecordBatch.from_arrays(arrays, names=batch.schema.names) if arrays else batch
    rows: list[dict[str, object]] = [
        {name: value for name, cell in row.items() if (value := _plain(cell, nested=False)) is not None}
        for row in plain.to_pylist(maps_as_pydicts="strict")
    ]
    # After the nulls: those inside of JSON were written on purpose and are no gaps of a schema.
    for field in batch.schema:
        if _EXTENSION_OF_JSON in str(field.type):
            for row in rows:
                if field.name in row:
                    row[field.name] = _decoded(row[field.name], field.type)
    return rows


def _decoded(value: object, kind: DataType) -> object:
    """A value in which texts of Arrow's type for JSON are what they say: `datasets` writes turns with calls so."""
    import pyarrow as pa
    import pyarrow.types as types

    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json" and isinstance(value, str):
        return decode_json(value)
    if isinstance(value, list) and (types.is_list(kind) or types.is_large_list(kind)):
        return [_decoded(item, kind.value_type) for item in value]
    if isinstance(value, dict) and types.is_struct(kind):
        return {name: _decoded(item, kind.field(name).type) for name, item in value.items()}
    return value


def _microseconds(kind: DataType) -> DataType:
    import pyarrow as pa
    import pyarrow.types as types

    if types.is_timestamp(kind):
        return pa.timestamp("us")
    if types.is_time64(kind):
        return pa.time64("us")
    if types.is_duration(kind):
        return pa.duration("us")
    if types.is_struct(kind):
        return pa.struct([kind.field(i).with_type(_microseconds(kind.field(i).type)) for i in range(kind.num_fields)])
    if types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_microseconds(kind.value_type)))
    if types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_microseconds(kind.value_type)))
    return kind


def _plain(value: object, *, nested: bool = True) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        items = {key: _plain(item) for key, item in value.items()}
        present = {key: item for key, item in items.items() if item is not None}
        # A struct of nulls alone is how some writers store a null struct.
        return present if present or not items else None
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value
    if nested and isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return value
