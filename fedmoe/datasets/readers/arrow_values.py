"""From Arrow's columns to plain Python values, shared by the Parquet, Arrow and hub readers."""

from __future__ import annotations

import datetime
import decimal
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedmoe.datasets.readers.json_rows import decode_json
from fedmoe.datasets.readers.lines import BadRow, DataError, Reading, Row, Rows

if TYPE_CHECKING:
    from pyarrow import Array, DataType, RecordBatch

ROWS_AT_ONCE = 256
_EXTENSION_OF_JSON = "extension<arrow.json>"


def wanted_columns(path: Path, names: Sequence[str], reading: Reading) -> list[str]:
    """The names to read, in the file's order; the others go to `reading.unread`."""
    wanted = [name for name in names if reading.columns is None or name in reading.columns]
    reading.unread.update(set(names).difference(wanted))
    if repeated := sorted({name for name in wanted if wanted.count(name) > 1}):
        raise DataError(f"{path}: columns named more than once: {repeated[:5]}; name each column once")
    return wanted


def rows_of_batch(batch: RecordBatch, first: int) -> Rows:
    """The rows of a batch, numbered from `first`; one that has no value in Python is a `BadRow` naming its column.

    Nulls are not there, at any depth of a struct (its schema is the union of all rows); NaN counts as null, as pandas
    writes it. Bytes that are UTF-8 are text. Inside structs and lists, times and decimals are their text.
    """
    try:
        values = _to_python(batch)
    except Exception:  # pyarrow raises what the column's type brings along: ValueError, OverflowError, KeyError, ...
        for index in range(batch.num_rows):
            yield _one_row(batch.slice(index, 1), first + index)
        return
    for index, fields in enumerate(values):
        yield Row(first + index, fields)


def _one_row(batch: RecordBatch, number: int) -> Row | BadRow:
    fields: dict[str, object] = {}
    for name in batch.schema.names:
        try:
            fields |= _to_python(batch.select([name]))[0]
        except Exception as error:
            return BadRow(number, f"{name!r} ({batch.schema.field(name).type}) cannot be read: {error}")
    return Row(number, fields)


def _to_python(batch: RecordBatch) -> list[dict[str, object]]:
    import pyarrow as pa

    arrays = [_in_microseconds(column) for column in batch.columns]
    plain = pa.RecordBatch.from_arrays(arrays, names=batch.schema.names) if arrays else batch
    found = [_plain_fields(fields) for fields in plain.to_pylist(maps_as_pydicts="strict")]
    # After the nulls: those inside of JSON were written by somebody and are no gaps of a schema.
    for field in batch.schema:
        if _EXTENSION_OF_JSON in str(field.type):
            found = [
                {**row, field.name: _decoded(row[field.name], field.type)} if field.name in row else row
                for row in found
            ]
    return found


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


def _in_microseconds(column: Array) -> Array:
    """Nanoseconds have no Python value without pandas, and time zones none without a database of them."""
    target = _microseconds(column.type)
    return column if target.equals(column.type) else column.cast(target, safe=False)


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


def _plain_fields(fields: dict[str, object]) -> dict[str, object]:
    found = {name: _plain(value, nested=False) for name, value in fields.items()}
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: object, *, nested: bool = True) -> object:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, dict):
        items = {key: _plain(item) for key, item in value.items()}
        there = {key: item for key, item in items.items() if item is not None}
        # A struct of nulls alone is how some writers store a null struct.
        return there if there or not items else None
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return _text(value)
    if nested and isinstance(value, datetime.date | datetime.time | datetime.timedelta | decimal.Decimal):
        return str(value)
    return value


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value
