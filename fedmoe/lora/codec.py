"""Codec of adapters: safetensors bytes in float32, bfloat16, or int8 with one scale per rank direction.

`decode` is the trust boundary for weights that come from the network: exactly the tensors of the layout, in one known
dtype, of the right shapes. `safetensors_bytes` checks the container first. Numbers that are not finite pass,
so that `update_rules.first_not_finite` can name them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fedmoe.lora.adapter import Adapter, FloatVector, Layout, ModuleShape, ShapeError
from fedmoe.lora.safetensors_bytes import (
    Buffer,
    MalformedError,
    MismatchError,
    TensorEntry,
    header_bytes,
    read_header,
    shown,
    tensor_entries,
)

WireDtype = Literal["fp32", "bf16", "int8"]
WIRE_DTYPES: tuple[WireDtype, ...] = get_args(WireDtype)
_FORMAT_NAMES: Mapping[WireDtype, str] = {"fp32": "F32", "bf16": "BF16", "int8": "I8"}
_FLOAT32 = np.dtype("<f4")
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_INT8 = np.dtype(np.int8)
_BFLOAT16_MAX = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
_STEPS = 127
# The largest scale whose product with 127 is still finite in float32.
_LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(_STEPS), np.float32(0))
_Number = TypeVar("_Number", bound=np.generic)


@dataclass(frozen=True)
class DecodedBody:
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
    """The vector as safetensors bytes; int8 is symmetric with one float32 scale per row of A and column of B.

    Raises `ShapeError` for a vector that is not the layout's, `ValueError` for numbers that bf16 or int8 cannot hold.
    """
    if flat.shape != (layout.size,) or flat.dtype != np.float32:
        raise ShapeError(f"expected {layout.size} float32 numbers, got {flat.dtype} of shape {flat.shape}")
    header = header_bytes(tensor_entries(_tensors(layout, wire_dtype)), metadata)
    if wire_dtype == "int8":
        numbers, scales = quantise(layout, flat)
        return b"".join((header, scales.astype(_FLOAT32, copy=False).data, numbers.data))
    data = np.ascontiguousarray(flat, _FLOAT32) if wire_dtype == "fp32" else _narrowed(flat)
    return b"".join((header, data.view(np.uint8).data))


def encoded_size(layout: Layout, wire_dtype: WireDtype) -> int:
    """The bytes that `encode` makes of any vector of this layout, without metadata."""
    scales = 2 * len(layout.modules) * layout.rank * _FLOAT32.itemsize if wire_dtype == "int8" else 0
    item = {"fp32": 4, "bf16": 2, "int8": 1}[wire_dtype]
    return len(header_bytes(tensor_entries(_tensors(layout, wire_dtype)))) + scales + layout.size * item


def _tensors(layout: Layout, wire_dtype: WireDtype) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of a body, in order: int8's scales come first."""
    factors = [(name, shape) for name, shape, _, _ in tensor_names(layout)]
    scales = [(f"{name}.scale", "F32", (layout.rank,)) for name, _ in factors] if wire_dtype == "int8" else []
    return [*scales, *((name, _FORMAT_NAMES[wire_dtype], shape) for name, shape in factors)]


def _narrowed(flat: FloatVector) -> NDArray[np.generic]:
    largest = max(float(flat.max()), -float(flat.min()))
    if not largest <= _BFLOAT16_MAX:
        raise ValueError(f"bfloat16 holds finite numbers up to {_BFLOAT16_MAX:g}, the vector has {largest:g}")
    return flat.astype(_BFLOAT16)


def quantise(layout: Layout, flat: FloatVector) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 of every factor with one scale per rank direction: (numbers, scales of A then B per module).

    Every number comes back within half a step (half its scale); a direction whose largest number is below 1.5e-36
    has scale 0 and comes back as zeros. Raises `ValueError` if a number is not finite.
    """
    numbers = np.empty(layout.size, np.int8)
    scales = np.empty((2 * len(layout.modules), layout.rank), np.float32)
    for index, (name, shape, start, stop) in enumerate(tensor_names(layout)):
        values, axis = flat[start:stop].reshape(shape), _feature_axis(index)
        scale = np.abs(values).max(axis=axis) / np.float32(_STEPS)
        if not np.isfinite(scale).all():
            raise ValueError(f"{name} holds a NaN or an infinity, which int8 cannot carry")
        # A subnormal scale is too coarse: its quotients leave the range of int8.
        scale = np.minimum(scale, _LARGEST_SCALE)
        scales[index] = np.where(scale >= np.finfo(np.float32).tiny, scale, np.float32(0))
        quotients = values / _along(np.where(scales[index] > 0, scales[index], np.float32(1)), axis)
        numbers[start:stop] = np.rint(quotients).reshape(-1)
    return numbers, scales


def dequantise(layout: Layout, numbers: NDArray[np.int8], scales: NDArray[np.float32]) -> FloatVector:
    """The float32 vector that int8 numbers and their scales stand for."""
    flat = np.empty(layout.size, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # scales come from outside; the finite check looks at the result
        for index, (_, shape, start, stop) in enumerate(tensor_names(layout)):
            scale = _along(scales[index], _feature_axis(index))
            np.multiply(numbers[start:stop].reshape(shape), scale, out=flat[start:stop].reshape(shape))
    return flat


def _feature_axis(index: int) -> int:
    """The axis along the features in the tensor at this place: 1 in A (r x in), 0 in B (out x r)."""
    return 1 - index % 2


def _along(scale: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    return scale[:, None] if axis == 1 else scale[None, :]


def decode(body: Buffer, layout: Layout) -> DecodedBody:
    """The vector in a body that must hold exactly the tensors of `layout`, in any order; it is read-only.

    Raises `MalformedError` for a body that is not valid safetensors and `MismatchError` for one that is not this
    layout's. An aligned float32 body in flat order is not copied: the result then shares the body's memory.
    """
    entries, metadata, data = read_header(body)
    wire_dtype = _wire_dtype(entries)
    expected = dict(_expected(layout, wire_dtype))
    _check_tensors(entries, expected)
    names = [name for name, *_ in tensor_names(layout)]
    if wire_dtype == "int8":
        numbers = _gather(entries, data, names, _INT8)
        scales = _gather(entries, data, [f"{name}.scale" for name in names], _FLOAT32)
        flat = dequantise(layout, numbers, scales.reshape(-1, layout.rank))
    elif wire_dtype == "bf16":
        with np.errstate(invalid="ignore"):  # a signalling NaN stays a NaN
            flat = _gather(entries, data, names, _BFLOAT16).astype(np.float32)
    else:
        flat = _gather(entries, data, names, _FLOAT32).astype(np.float32, copy=False)
    flat.flags.writeable = False
    return DecodedBody(flat, wire_dtype, metadata)


def encode_adapter(adapter: Adapter) -> bytes:
    """A whole adapter as float32 safetensors bytes that say its shape and alpha, for `decode_adapter`."""
    return encode(adapter.layout, adapter.flat, metadata={"alpha": repr(adapter.alpha)})


def decode_adapter(body: Buffer) -> Adapter:
    """The adapter of `encode_adapter`, bit for bit; raises `MalformedError` or `MismatchError` for anything else."""
    entries, metadata, _ = read_header(body)
    shapes = {name: entry.shape for name, entry in entries.items()}
    firsts = {name.removesuffix(".lora_A"): shape for name, shape in shapes.items() if name.endswith(".lora_A")}
    try:
        modules = [ModuleShape(name, firsts[name][1], shapes[f"{name}.lora_B"][0]) for name in firsts]
        layout, alpha = Layout(tuple(modules), min(shape[0] for shape in firsts.values())), float(metadata["alpha"])
    except (KeyError, IndexError, ValueError) as error:
        raise MalformedError(f"no whole adapter: lora_A, lora_B and alpha are needed, got {shown(shapes)}") from error
    return Adapter(layout, alpha, decode(body, layout).flat)


def _wire_dtype(entries: Mapping[str, TensorEntry]) -> WireDtype:
    dtypes = {entry.dtype for name, entry in entries.items() if not name.endswith(".scale")}
    for wire_dtype, name in _FORMAT_NAMES.items():
        if dtypes == {name}:
            return wire_dtype
    raise MismatchError(
        "dtype_not_accepted",
        f"tensors are {shown(sorted(dtypes)) or 'missing'}; send all as one of F32, BF16 or I8 with F32 scales",
    )


def _expected(layout: Layout, wire_dtype: WireDtype) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    for name, shape, _, _ in tensor_names(layout):
        yield name, (_FORMAT_NAMES[wire_dtype], shape)
        if wire_dtype == "int8":
            yield f"{name}.scale", ("F32", (layout.rank,))


def _check_tensors(entries: Mapping[str, TensorEntry], expected: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    missing, extra = sorted(expected.keys() - entries.keys()), sorted(entries.keys() - expected.keys())
    if missing or extra:
        parts = [f"{what} {shown(names)}" for what, names in (("missing", missing), ("not expected", extra)) if names]
        count = len(missing) + len(extra)
        raise MismatchError("tensor_mismatch", f"{count} tensors differ from the manifest: {'; '.join(parts)}")
    for name, (dtype, shape) in expected.items():
        entry = entries[name]
        if entry.dtype != dtype:
            raise MismatchError("dtype_not_accepted", f"{name!r} is {shown([entry.dtype])}, expected {dtype}")
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
    entries: Mapping[str, TensorEntry], data: memoryview, names: list[str], dtype: np.dtype[_Number]
) -> NDArray[_Number]:
    """All named tensors one after another, aligned; a view of `data` if they already lie that way."""
    parts = [entries[name] for name in names]
    if all(left.stop == right.start for left, right in pairwise(parts)):
        return np.require(np.frombuffer(data[parts[0].start : parts[-1].stop], dtype), requirements="A")
    return np.concatenate([np.frombuffer(data[part.start : part.stop], dtype) for part in parts])


def digest(adapter: Adapter) -> str:
    """The content hash of an adapter: sha256 over its layout, alpha and float32 numbers, as 64 hex digits."""
    shape = [adapter.rank, adapter.alpha, [[m.name, m.in_features, m.out_features] for m in adapter.layout.modules]]
    hasher = hashlib.sha256(json.dumps(shape, separators=(",", ":")).encode())
    hasher.update(np.ascontiguousarray(adapter.flat, "<f4").data)
    return hasher.hexdigest()
