"""Strict reader and writer of the safetensors container: each tensor's name, type, shape and place in the bytes.

The reader is stricter than the format, because the bytes come from the network: a capped header, no repeated keys, no
hole, overlap or trailing byte, bounded metadata. It never unpickles and never calls or opens a name from the data; a
bad body raises `CodecError` and nothing else. Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

MAX_HEADER_BYTES = 1 << 20
MAX_METADATA_CHARACTERS = 1 << 16
_MAX_DIMENSIONS = 8
_PREFIX_BYTES = 8
_SHOWN_CHARACTERS = 120
_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
_READ_AS = {"F32": np.dtype("<f4"), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2")}

Buffer = bytes | bytearray | memoryview


class CodecError(ValueError):
    """A body that cannot be taken; `code` is stable for programs, the text is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class MalformedError(CodecError):
    """Not safetensors at all, or safetensors that contradict themselves."""

    def __init__(self, message: str, code: str = "malformed") -> None:
        super().__init__(code, message)


class MismatchError(CodecError):
    """Well-formed, but not what the layout asks for."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header: dtype name of the format, shape, and where its bytes lie in the data part."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def shown(names: Iterable[str]) -> str:
    """At most five names as Python literals, each cut short, so that no message grows with what was sent."""
    listed = list(names)
    parts = [repr(name if len(name) <= _SHOWN_CHARACTERS else name[:_SHOWN_CHARACTERS] + "...") for name in listed[:5]]
    return ", ".join(parts) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def header_bytes(header: Mapping[str, object], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length prefix and the JSON header; raises `MalformedError` for one that `read_header` would refuse."""
    if "__metadata__" in header:
        raise MalformedError("a tensor cannot be called '__metadata__'; the format keeps that name")
    full = {"__metadata__": dict(metadata), **header} if metadata else dict(header)
    _metadata(dict(metadata or {}))
    text = json.dumps(full, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PREFIX_BYTES)  # keeps the data aligned, as the format recommends
    if len(text) > MAX_HEADER_BYTES:
        raise MalformedError(f"the header takes {len(text)} bytes; at most {MAX_HEADER_BYTES} are read")
    return len(text).to_bytes(_PREFIX_BYTES, "little") + text


def read_header(body: Buffer) -> tuple[dict[str, TensorEntry], dict[str, str], memoryview]:
    """Entries, metadata and the data part of any safetensors body, checked for what the format promises."""
    view = memoryview(body).cast("B")
    if len(view) < _PREFIX_BYTES:
        raise MalformedError(f"a body of {len(view)} bytes cannot be safetensors (8 bytes of length first)")
    length = int.from_bytes(view[:_PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise MalformedError(f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if _PREFIX_BYTES + length > len(view):
        raise MalformedError(f"the header claims {length} bytes, the body has {len(view) - _PREFIX_BYTES}")
    header = _parse_json(bytes(view[_PREFIX_BYTES : _PREFIX_BYTES + length]))
    data = view[_PREFIX_BYTES + length :]
    metadata = _metadata(header.pop("__metadata__", {}))
    entries = {name: _entry(name, value) for name, value in header.items()}
    _check_contiguous(entries, len(data))
    return entries, metadata, data


def _parse_json(text: bytes) -> dict[str, object]:
    if not text.startswith(b"{"):
        raise MalformedError(f"the header must be a JSON object, it begins with {text[:8]!r}")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
        "".join(header).encode()  # JSON can spell half of a surrogate pair, which no later writer could write
    except CodecError:
        raise
    except (ValueError, RecursionError) as error:  # also text that is not UTF-8 and integers beyond Python's limit
        raise MalformedError(f"the header is not JSON: {error}") from None
    assert isinstance(header, dict)
    return header


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
        raise MalformedError(f"the header names a tensor more than once: {shown(repeated)}", "duplicate_key")
    return unique


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
        raise MalformedError("__metadata__ must map strings to strings")
    texts = [*value.keys(), *value.values()]
    characters = sum(map(len, texts))
    if characters > MAX_METADATA_CHARACTERS:
        raise MalformedError(f"__metadata__ has {characters} characters; at most {MAX_METADATA_CHARACTERS} are read")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise MalformedError("__metadata__ holds half of a surrogate pair; send valid Unicode") from None
    return value


def _entry(name: str, value: object) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedError(f"tensor {shown([name])} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise MalformedError(f"tensor {shown([name])}: dtype must be a string")
    if not _counts(shape, _MAX_DIMENSIONS) or not _counts(offsets, 2) or len(offsets) != 2:
        raise MalformedError(
            f"tensor {shown([name])}: shape must list at most {_MAX_DIMENSIONS} counts, data_offsets two of them"
        )
    size = _BYTES.get(dtype)
    length = offsets[1] - offsets[0]
    if length < 0 or (size is not None and length != math.prod(shape) * size):
        raise MalformedError(
            f"tensor {shown([name])}: {shown([dtype])} of shape {shape} does not fit into bytes {offsets}"
        )
    return TensorEntry(dtype, tuple(shape), offsets[0], offsets[1])


def _counts(value: object, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 62 for item in value)
    )


def _check_contiguous(entries: Mapping[str, TensorEntry], available: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise MalformedError(f"tensor {shown([name])} starts at byte {entry.start}, expected {position}")
        position = entry.stop
    if position != available:
        raise MalformedError(f"the tensors cover {position} bytes, the body carries {available}")


def tensor_entries(tensors: Iterable[tuple[str, str, Sequence[int]]]) -> dict[str, object]:
    """The header's entries for tensors that lie one after another: their names, dtypes of the format, and shapes."""
    entries: dict[str, object] = {}
    start = 0
    for name, dtype, shape in tensors:
        stop = start + math.prod(shape) * _BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    return entries


def encode_named(tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Any float32 arrays by name as safetensors bytes, in the order given."""
    header = tensor_entries((name, "F32", values.shape) for name, values in tensors.items())
    parts = (np.ascontiguousarray(values, "<f4").data for values in tensors.values())
    return b"".join((header_bytes(header, metadata), *parts))


def read_named(body: Buffer) -> dict[str, NDArray[np.float32]]:
    """The float32, bfloat16 or float16 arrays of a safetensors body, by name, as float32."""
    entries, _, data = read_header(body)
    arrays = {}
    for name, entry in entries.items():
        if entry.dtype not in _READ_AS:
            raise MismatchError(
                "dtype_not_accepted", f"{shown([name])} is {shown([entry.dtype])}; {', '.join(_READ_AS)} are read"
            )
        values = np.frombuffer(data[entry.start : entry.stop], _READ_AS[entry.dtype])
        with np.errstate(invalid="ignore"):  # a signalling NaN stays a NaN, for the finite check to name
            wide = values.astype(np.float32, copy=False)
        arrays[name] = np.require(wide, np.float32, "A").reshape(entry.shape)
    return arrays


def whole_numbers(metadata: Mapping[str, str], keys: Sequence[str], digits: int) -> list[int]:
    """The counts of at most so many digits that metadata hold under these keys; raises `MalformedError` for others."""
    texts = [metadata.get(key, "") for key in keys]
    if not all(text.isascii() and text.isdigit() and len(text) <= digits for text in texts):
        raise MalformedError(f"{' and '.join(keys)} must be whole numbers, got {shown(texts)}")
    return [int(text) for text in texts]
