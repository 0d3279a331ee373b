"""What is fuzzed: readers of bytes from outside. Each takes any bytes and raises only what its reader documents.

Parquet and Arrow files are decoded by pyarrow. So that our part of those readers is judged and not pyarrow, their files
are well-formed ones, of columns that the bytes choose.
"""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from support import LAYOUT, accepted, make_adapter, make_flat, registered

from fedmoe.datasets.readers.common import DataError, ReadOptions
from fedmoe.datasets.readers.data_file import read_file
from fedmoe.datasets.row_scan import check_file
from fedmoe.federation.events import Event, ExpertRebased, ExpertRolledBack, GatewayMerged, WorkerRetracted
from fedmoe.lora.codec import WIRE_DTYPES, decode, encode
from fedmoe.lora.formats import npz_bytes, read_npz
from fedmoe.lora.safetensors_bytes import CodecError, encode_named, read_header, read_named
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.event_rows import event_of, row_of

_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
_SMALL = 4096


def container(data: bytes) -> None:
    """The safetensors reader: headers, then arrays."""
    with suppress(CodecError):
        entries, metadata, content = read_header(data)
        assert sum(entry.stop - entry.start for entry in entries.values()) == len(content)
        assert all(isinstance(text, str) for pair in metadata.items() for text in pair)
    with suppress(CodecError):
        arrays = read_named(data)
        assert all(array.dtype == np.float32 for array in arrays.values())


def codec(data: bytes) -> None:
    """Weights of a known layout; what is read can be written again and is the same."""
    with suppress(CodecError):
        decoded = decode(data, LAYOUT)
        assert decoded.flat.shape == (LAYOUT.size,)
        again = decode(encode(LAYOUT, decoded.flat), LAYOUT).flat
        assert again.tobytes() == decoded.flat.tobytes()


def npz(data: bytes) -> None:
    """A gateway as npz."""
    with suppress(CodecError):
        read_npz(data)


def journal_rows(data: bytes) -> None:
    """A row's kind and payload, the kind before the first line break; an event that is read is written as it was."""
    kind, _, payload = data.decode("utf-8", "replace").partition("\n")
    with suppress(StorageFailedError):
        event = event_of(kind, payload)
        row = row_of(event)
        assert event_of(str(row["kind"]), str(row["payload"])) == event


def _read(name: str, data: bytes) -> None:
    path = Path(_FOLDER.name) / name
    path.write_bytes(data)
    for small in (False, True):
        with suppress(DataError):
            for row in read_file(path, ReadOptions(max_row_bytes=_SMALL if small else 1 << 24)):
                assert row.line > 0
    with suppress(DataError):
        check_file(path)


def jsonl(data: bytes) -> None:
    """JSON lines."""
    _read("rows.jsonl", data)


def json_array(data: bytes) -> None:
    """A JSON file, an array or lines."""
    _read("rows.json", data)


def csv(data: bytes) -> None:
    """A CSV file, then the same bytes separated by tabs."""
    _read("rows.csv", data)
    _read("rows.tsv", data)


def _table(data: bytes) -> pa.Table | None:
    """A table whose columns, types and values the bytes choose: JSON values under names, as pyarrow types them."""
    try:
        columns = json.loads(data.decode("utf-8", "replace"))
        assert isinstance(columns, dict)
        return pa.table({name: pa.array(values) for name, values in columns.items() if isinstance(values, list)})
    except (ValueError, RecursionError, AssertionError, pa.ArrowException, OverflowError, TypeError):
        return None


def parquet(data: bytes) -> None:
    """A Parquet file of the bytes' columns."""
    table = _table(data)
    if table is not None:
        file = io.BytesIO()
        try:
            pq.write_table(table, file)
        except (pa.ArrowException, ValueError):
            return
        _read("rows.parquet", file.getvalue())


def arrow(data: bytes) -> None:
    """An Arrow file, and the same as a stream."""
    table = _table(data)
    if table is not None:
        for new in (pa.ipc.new_file, pa.ipc.new_stream):
            file = io.BytesIO()
            with new(file, table.schema) as writer:
                writer.write_table(table)
            _read("rows.arrow", file.getvalue())


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "container": container,
    "codec": codec,
    "npz": npz,
    "journal_rows": journal_rows,
    "jsonl": jsonl,
    "json_array": json_array,
    "csv": csv,
    "parquet": parquet,
    "arrow": arrow,
}


def seeds(name: str) -> list[bytes]:
    """Well-formed inputs to begin with."""
    if name == "container":
        return [encode_named({"a": np.ones((2, 3), np.float32)}, {"k": "v"}), encode_named({}), b"\2\0\0\0\0\0\0\0{}"]
    if name == "codec":
        return [encode(LAYOUT, make_flat(1), dtype) for dtype in WIRE_DTYPES]
    if name == "npz":
        return [npz_bytes(make_adapter(1), 3, {"python": 2})]
    if name == "journal_rows":
        events: list[Event] = [
            registered(),
            accepted(1),
            ExpertRolledBack("a", 1, 2, "", 5.0),
            WorkerRetracted("a", "w1", 2, 7, "", 6.0),
            GatewayMerged(1, 4, "a" * 64, {"a": 3}, {"a": 0}, {"a": 0.5}, 0.0, 1.0, ("one",), 7.0),
            ExpertRebased("a", 1, "a" * 64, 0, 4, 8.0),
        ]
        stored = [row_of(event) for event in events]
        return [f"{row['kind']}\n{row['payload']}".encode() for row in stored]
    if name in ("parquet", "arrow"):
        return [
            b'{"text": ["one", "two", null], "n": [1, 2, 3]}',
            b'{"messages": [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]}',
            b'{"prompt": ["a"], "chosen": ["b"], "rejected": ["c"], "x": [{"y": [1.5]}]}',
        ]
    rows = [
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        '{"prompt": "a", "completion": "b"}',
        '{"text": "a", "tools": "[]", "n": 1.5}',
    ]
    if name == "csv":
        return [b'prompt,completion\n"a ""b""",c\nd,e\n', b"text\nalpha\n", b"a\tb\n1\t2\n"]
    if name == "json_array":
        return [f"[{','.join(rows)}]".encode(), "\n".join(rows).encode()]
    return ["\n".join(rows).encode() + b"\n", b'\xef\xbb\xbf{"text": "a"}\r\n']
