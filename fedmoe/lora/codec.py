"""Adapter <-> safetensors bytes, in float32, bfloat16 or int8 with one scale per rank direction.

The reader is the trust boundary for weights that come from the network. It is stricter than the format: a capped header,
no repeated keys, exactly the tensors of the layout, contiguous data, known dtypes. It never unpickles and never calls
a name from the data. Format: https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fedmoe.lora.adapter import Adapter, FloatVector, Layout

WireDtype = Literal["fp32", "bf16", "int8"]
WIRE_DTYPES: tuple[WireDtype, ...] = get_args(WireDtype)
MAX_HEADER_BYTES = 1 << 20
_PREFIX_BYTES = 8
_FORMAT_NAMES = {"fp32": "F32", "bf16": "BF16", "int8": "I8"}
_BYTES = {"F32": 4, "BF16": 2, "I8": 1}

Buffer = bytes | bytearray | memoryview


class CodecError(ValueError):
    """A body that cannot be taken; `code` is stable for programs, the text is for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class MalformedError(CodecError):
    """Not safetensors at all, or safetensors that contradict themselves."""


class MismatchError(CodecError):
    """Well-formed, but not what the layout asks for."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a header: dtype name of the format, shape, and where its bytes lie in the data part."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Decoded:
    """A checked body: the flat float32 vector, how it travelled, and the sender's metadata."""

    flat: FloatVector
    wire_dtype: WireDtype
    metadata: dict[str, str]


def tensor_names(layout: Layout) -> Iterator[tuple[str, tuple[int, int], int, int]]:
    """Name, shape, start and stop (in numbers) of every factor, in flat order."""
    for module in layout.modules:
        span = layout.spans[module.name]
        yield f"{module.name}.lora_A", (layout.rank, module.in_features), span.start, span.middle
        yield f"{module.name}.lora_B", (module.out_features, layout.rank), span.middle, span.stop


def encode(
    layout: Layout, flat: FloatVector, wire_dtype: WireDtype = "fp32", metadata: dict[str, str] | None = None
) -> bytes:
    """The vector as safetensors bytes; int8 is symmetric with one float32 scale per row of A and column of B."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    if wire_dtype == "int8":
        quantised, scales = quantise(layout, flat)
        _describe(header, layout, "F32", scales_only=True, offset=0)
        _describe(header, layout, "I8", scales_only=False, offset=scales.nbytes)
        return b"".join((_header_bytes(header), scales.tobytes(), quantised.tobytes()))
    _describe(header, layout, _FORMAT_NAMES[wire_dtype], scales_only=False, offset=0)
    data = flat if wire_dtype == "fp32" else flat.astype(ml_dtypes.bfloat16)
    return b"".join((_header_bytes(header), memoryview(np.ascontiguousarray(data).view(np.uint8))))


def _header_bytes(header: dict[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _PREFIX_BYTES)  # keeps the data aligned, as the format recommends
    return len(text).to_bytes(_PREFIX_BYTES, "little") + text


def _describe(header: dict[str, object], layout: Layout, dtype: str, scales_only: bool, offset: int) -> None:
    for name, shape, _, _ in tensor_names(layout):
        dims = [layout.rank] if scales_only else list(shape)
        stop = offset + int(np.prod(dims)) * _BYTES[dtype]
        header[f"{name}.scale" if scales_only else name] = {
            "dtype": dtype,
            "shape": dims,
            "data_offsets": [offset, stop],
        }
        offset = stop


def quantise(layout: Layout, flat: FloatVector) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 of every factor with one scale per rank direction: (numbers, scales of A then B per module)."""
    numbers = np.empty(layout.size, np.int8)
    scales = np.empty((2 * len(layout.modules), layout.rank), np.float32)
    for index, (name_part, axis) in enumerate(_directions(layout)):
        start, stop, shape = name_part
        values = flat[start:stop].reshape(shape)
        scale = np.abs(values).max(axis=axis) / np.float32(127)
        scales[index] = scale
        safe = np.where(scale > 0, scale, np.float32(1))
        numbers[start:stop] = np.rint(values / _along(safe, axis)).astype(np.int8).reshape(-1)
    return numbers, scales


def dequantise(layout: Layout, numbers: NDArray[np.int8], scales: NDArray[np.float32]) -> FloatVector:
    """The float32 vector that int8 numbers and their scales stand for."""
    flat = np.empty(layout.size, np.float32)
    for index, ((start, stop, shape), axis) in enumerate(_directions(layout)):
        np.multiply(
            numbers[start:stop].reshape(shape), _along(scales[index], axis), out=flat[start:stop].reshape(shape)
        )
    return flat


def _directions(layout: Layout) -> Iterator[tuple[tuple[int, int, tuple[int, int]], int]]:
    """Where each factor lies and the axis that runs along the features: 1 in A (r x in), 0 in B (out x r)."""
    for index, (_, shape, start, stop) in enumerate(tensor_names(layout)):
        yield (start, stop, shape), 1 - index % 2


def _along(scale: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    return scale[:, None] if axis == 1 else scale[None, :]


def decode(body: Buffer, layout: Layout) -> Decoded:
    """The vector in a body that must hold exactly the tensors of `layout`, in any order.

    Raises `MalformedError` for a body that is not valid safetensors and `MismatchError` for one that is not this layout's.
    A float32 body in flat order is not copied: the result then shares the body's memory.
    """
    entries, metadata, data = read_header(body)
    wire_dtype = _wire_dtype(entries)
    expected = dict(_expected(layout, wire_dtype))
    _check_tensors(entries, expected)
    if wire_dtype == "int8":
        numbers = _gather(entries, data, [name for name, *_ in tensor_names(layout)], np.dtype(np.int8))
        scales = _gather(entries, data, [f"{name}.scale" for name, *_ in tensor_names(layout)], np.dtype("<f4"))
        return Decoded(dequantise(layout, numbers, scales.reshape(-1, layout.rank)), wire_dtype, metadata)
    stored = np.dtype("<f4") if wire_dtype == "fp32" else np.dtype(ml_dtypes.bfloat16)
    flat = _gather(entries, data, list(expected), stored)
    return Decoded(flat.astype(np.float32, copy=False), wire_dtype, metadata)


def read_header(body: Buffer) -> tuple[dict[str, TensorEntry], dict[str, str], memoryview]:
    """Entries, metadata and the data part of any safetensors body, checked for what the format promises."""
    view = memoryview(body)
    if len(view) < _PREFIX_BYTES:
        raise MalformedError("malformed", f"a body of {len(view)} bytes cannot be safetensors (8 bytes of length first)")
    length = int.from_bytes(view[:_PREFIX_BYTES], "little")
    if length > MAX_HEADER_BYTES:
        raise MalformedError("malformed", f"the header claims {length} bytes; at most {MAX_HEADER_BYTES} are read")
    if _PREFIX_BYTES + length > len(view):
        raise MalformedError("malformed", f"the header claims {length} bytes, the body has {len(view) - _PREFIX_BYTES}")
    header = _parse_json(bytes(view[_PREFIX_BYTES : _PREFIX_BYTES + length]))
    data = view[_PREFIX_BYTES + length :]
    metadata = _metadata(header.pop("__metadata__", {}))
    entries = {name: _entry(name, value) for name, value in header.items()}
    _check_contiguous(entries, len(data))
    return entries, metadata, data


def _parse_json(text: bytes) -> dict[str, object]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise MalformedError("malformed", f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise MalformedError("malformed", f"the header must be a JSON object, got {type(header).__name__}")
    return header


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = sorted({name for name in names if names.count(name) > 1})[:5]
        raise MalformedError("duplicate_key", f"the header names a tensor more than once: {repeated!r}")
    return found


def _metadata(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise MalformedError("malformed", "__metadata__ must map strings to strings")
    return value


def _entry(name: str, value: object) -> TensorEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise MalformedError("malformed", f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise MalformedError("malformed", f"tensor {name!r}: shape and data_offsets must be lists of counts")
    if not isinstance(value["dtype"], str):
        raise MalformedError("malformed", f"tensor {name!r}: dtype must be a string")
    entry = TensorEntry(value["dtype"], tuple(shape), offsets[0], offsets[1])
    size = _BYTES.get(entry.dtype)
    numbers = 1
    for dimension in entry.shape:
        numbers *= dimension
    if entry.stop < entry.start or (size is not None and entry.stop - entry.start != numbers * size):
        raise MalformedError(
            "malformed", f"tensor {name!r}: {entry.dtype}{list(shape)} does not fit into bytes {offsets}"
        )
    return entry


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 62 for item in value
    )


def _check_contiguous(entries: dict[str, TensorEntry], available: int) -> None:
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            raise MalformedError("malformed", f"tensor {name!r} starts at byte {entry.start}, expected {position}")
        position = entry.stop
    if position != available:
        raise MalformedError("malformed", f"the tensors cover {position} bytes, the body carries {available}")


def _wire_dtype(entries: dict[str, TensorEntry]) -> WireDtype:
    dtypes = {entry.dtype for name, entry in entries.items() if not name.endswith(".scale")}
    for wire_dtype, name in _FORMAT_NAMES.items():
        if dtypes == {name}:
            return wire_dtype  # type: ignore[return-value]
    raise MismatchError(
        "dtype_not_accepted", f"tensors are {sorted(dtypes)}; send all as one of F32, BF16 or I8 with F32 scales"
    )


def _expected(layout: Layout, wire_dtype: WireDtype) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for name, shape, _, _ in tensor_names(layout):
        yield name, (_FORMAT_NAMES[wire_dtype], shape)
        if wire_dtype == "int8":
            yield f"{name}.scale", ("F32", (layout.rank,))


def _check_tensors(entries: dict[str, TensorEntry], expected: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    missing, extra = expected.keys() - entries.keys(), entries.keys() - expected.keys()
    if missing or extra:
        shown = [f"missing {name!r}" for name in sorted(missing)] + [f"not expected {name!r}" for name in sorted(extra)]
        raise MismatchError(
            "tensor_mismatch", f"{len(shown)} tensors differ from the manifest: {', '.join(shown[:5])}"
        )
    for name, (dtype, shape) in expected.items():
        entry = entries[name]
        if entry.dtype != dtype:
            raise MismatchError("dtype_not_accepted", f"{name!r} is {entry.dtype}, expected {dtype}")
        if entry.shape != shape:
            raise MismatchError(*_shape_problem(name, shape, entry.shape))


def _shape_problem(name: str, expected: tuple[int, ...], got: tuple[int, ...]) -> tuple[str, str]:
    rank_axis = 0 if name.endswith("lora_A") else 1
    if len(got) == 2 and len(expected) == 2:
        if got == expected[::-1]:
            return "shape_mismatch", f"{name!r}: expected {list(expected)}, got {list(got)}; A is r x in, B is out x r"
        if got[1 - rank_axis] == expected[1 - rank_axis]:
            return "rank_mismatch", f"{name!r}: expected rank {expected[rank_axis]}, got rank {got[rank_axis]}"
    return "shape_mismatch", f"{name!r}: expected shape {list(expected)}, got {list(got)}"


def _gather(
    entries: dict[str, TensorEntry], data: memoryview, names: list[str], dtype: np.dtype[np.generic]
) -> NDArray[np.generic]:
    """All named tensors one after another; a view of `data` if they already lie that way."""
    parts = [entries[name] for name in names]
    if all(left.stop == right.start for left, right in zip(parts, parts[1:], strict=False)):
        return np.frombuffer(data[parts[0].start : parts[-1].stop], dtype)
    return np.concatenate([np.frombuffer(data[part.start : part.stop], dtype) for part in parts])


def digest(adapter: Adapter) -> str:
    """The content hash of an adapter: sha256 over its layout, alpha and float32 numbers, as 64 hex digits."""
    shape = [adapter.rank, adapter.alpha, [[m.name, m.in_features, m.out_features] for m in adapter.layout.modules]]
    hasher = hashlib.sha256(json.dumps(shape, separators=(",", ":")).encode())
    hasher.update(memoryview(np.ascontiguousarray(adapter.flat, "<f4").view(np.uint8)))
    return hasher.hexdigest()


def encode_named(tensors: dict[str, NDArray[np.float32]], metadata: dict[str, str] | None = None) -> bytes:
    """Any float32 arrays by name as safetensors bytes, in the order given."""
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    parts = []
    for name, values in tensors.items():
        data = np.ascontiguousarray(values, "<f4")
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [offset, offset + data.nbytes]}
        offset += data.nbytes
        parts.append(data.tobytes())
    return b"".join((_header_bytes(header), *parts))


def read_named(body: Buffer) -> dict[str, NDArray[np.float32]]:
    """The float32 or bfloat16 arrays of a safetensors body, by name, as float32."""
    entries, _, data = read_header(body)
    stored = {"F32": np.dtype("<f4"), "BF16": np.dtype(ml_dtypes.bfloat16)}
    arrays = {}
    for name, entry in entries.items():
        if entry.dtype not in stored:
            raise MismatchError("dtype_not_accepted", f"{name!r} is {entry.dtype}; F32 and BF16 are read")
        values = np.frombuffer(data[entry.start : entry.stop], stored[entry.dtype])
        arrays[name] = values.astype(np.float32, copy=False).reshape(entry.shape)
    return arrays
