"""The protocol between a learner and its process: length-prefixed JSON and safetensors on a socket."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedmoe.areal.config import ArealError

Array = NDArray[np.float32] | NDArray[np.int32]
Value = str | int | float | bool | None

#: First bytes of every frame, with the version of this protocol.
MAGIC = b"FMA1"
MAX_JSON_BYTES = 1 << 22
MAX_ARRAY_BYTES = 1 << 32
_LENGTHS = struct.Struct("<4sIQ")
_DTYPES = (np.dtype(np.float32), np.dtype(np.int32))
_PIECE = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One request or answer: its `kind`, flat JSON `values`, and float32 or int32 `arrays` by name."""

    kind: str
    values: Mapping[str, Value] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)


def encode(frame: Frame) -> bytes:
    """The frame as bytes: magic, length of the JSON (4 bytes), length of the safetensors (8 bytes), both parts."""
    wrong = [name for name, array in frame.arrays.items() if array.dtype not in _DTYPES]
    if wrong:
        raise ArealError(f"frames carry float32 and int32 arrays; these are others: {', '.join(sorted(wrong))}")
    text = json.dumps({"kind": frame.kind, "values": dict(frame.values)}).encode()
    body = save({name: np.ascontiguousarray(array) for name, array in frame.arrays.items()}) if frame.arrays else b""
    _check_lengths(len(text), len(body))
    return _LENGTHS.pack(MAGIC, len(text), len(body)) + text + body


def send(channel: socket.socket, frame: Frame) -> None:
    """Write one frame; raises OSError when the other end is closed."""
    channel.sendall(encode(frame))


def receive(channel: socket.socket) -> Frame | None:
    """Read one frame, None at a proper end; raises `ArealError` for a torn or foreign one, TimeoutError when late."""
    head = _read(channel, _LENGTHS.size)
    if not head:
        return None
    if len(head) != _LENGTHS.size:
        raise ArealError(f"the frame ends within its first {_LENGTHS.size} bytes")
    magic, json_bytes, array_bytes = _LENGTHS.unpack(head)
    if magic != MAGIC:
        raise ArealError(f"a frame begins with {MAGIC!r}, got {magic!r}; both sides must have one version of FedMoE")
    _check_lengths(json_bytes, array_bytes)
    text = _read(channel, json_bytes)
    body = _read(channel, array_bytes)
    if len(text) != json_bytes or len(body) != array_bytes:
        raise ArealError(f"the frame announces {json_bytes} + {array_bytes} bytes and ends after {len(text + body)}")
    return _parse(text, body)


def _check_lengths(json_bytes: int, array_bytes: int) -> None:
    if json_bytes > MAX_JSON_BYTES or array_bytes > MAX_ARRAY_BYTES:
        raise ArealError(
            f"a frame has at most {MAX_JSON_BYTES} + {MAX_ARRAY_BYTES} bytes, got {json_bytes} + {array_bytes}"
        )


def _read(channel: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        piece = channel.recv(min(_PIECE, length - len(data)))
        if not piece:
            break
        data += piece
    return bytes(data)


def _parse(text: bytes, body: bytes) -> Frame:
    try:
        head = json.loads(text)
        kind, values = head["kind"], head["values"]
        arrays = load(body) if body else {}
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise ArealError(f"not a frame: {error}") from error
    if not isinstance(kind, str) or not isinstance(values, dict) or len(head) != 2:
        raise ArealError(f"a frame has a kind and values, got {text[:200]!r}")
    if any(array.dtype not in _DTYPES for array in arrays.values()):
        raise ArealError("frames carry float32 and int32 arrays only")
    return Frame(kind, values, arrays)
