"""TensorBoard event files with scalars, written without TensorBoard: frames with checksums around a few bytes.

Format: https://github.com/tensorflow/tensorboard, `record_writer.py` (frames) and `event.proto`, `summary.proto`.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path


class EventFile:
    """One event file in a folder; TensorBoard finds it by its name. Values are readable as soon as they are added."""

    def __init__(self, folder: Path) -> None:
        """Make the folder and the file; raises OSError when that cannot be."""
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = (folder / name).open("xb", buffering=0)
        self._file.write(frame(_double(1, now) + _bytes(3, b"brain.Event:2")))

    def add(self, at: float, step: int, scalars: Mapping[str, float]) -> None:
        """Append values of one moment (seconds since 1970) and step."""
        self._file.write(frame(event(at, step, scalars)))

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def event(at: float, step: int, scalars: Mapping[str, float]) -> bytes:
    """An Event message: wall_time (1), step (2), summary (5) of values (1) with tag (1) and simple_value (2)."""
    values = b"".join(_bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in scalars.items())
    return _double(1, at) + _varint(2 << 3) + _varint(step) + _bytes(5, values)


def frame(data: bytes) -> bytes:
    """A record of the file: length, its checksum, data, its checksum; all little-endian."""
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))


def masked(data: bytes) -> int:
    """CRC-32C, turned and shifted so that checksums of checksums stay strong."""
    checksum = crc32c(data)
    return ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _table_entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    return value


_TABLE = tuple(map(_table_entry, range(256)))


def crc32c(data: bytes) -> int:
    """CRC with Castagnoli's polynomial (RFC 3720, B.4)."""
    checksum = 0xFFFFFFFF
    for byte in data:
        checksum = checksum >> 8 ^ _TABLE[(checksum ^ byte) & 0xFF]
    return checksum ^ 0xFFFFFFFF


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; negative numbers as 64 bits, as protocol buffers have it."""
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
