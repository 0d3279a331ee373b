import contextlib
import json
import socket
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedmoe.areal.config import ArealError
from fedmoe.areal.rpc import MAGIC, MAX_JSON_BYTES, Array, Frame, Value, encode, receive, send


def decode(data: bytes) -> Frame:
    """The frame in these bytes, as a socket gives it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(data)
        ours.shutdown(socket.SHUT_WR)
        frame = receive(theirs)
    if frame is None:
        raise ArealError("there is no frame")
    return frame


VALUES = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False))
SHAPES = npst.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=5)
ARRAYS = st.dictionaries(
    st.text("abc_", min_size=1, max_size=5),
    SHAPES.flatmap(lambda shape: npst.arrays(np.float32, shape) | npst.arrays(np.int32, shape)),
    max_size=3,
)


@settings(deadline=None)
@given(st.text(), VALUES, ARRAYS)
def test_a_frame_comes_back_as_it_was(kind: str, values: dict[str, Value], arrays: dict[str, Array]) -> None:
    frame = decode(encode(Frame(kind, values, arrays)))
    assert frame.kind == kind
    assert frame.values == values
    assert frame.arrays.keys() == arrays.keys()
    for name, array in arrays.items():
        assert frame.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(frame.arrays[name], array)


def test_arrays_that_are_views_travel_whole() -> None:
    matrix = np.arange(12, dtype=np.int32).reshape(3, 4)
    frame = decode(encode(Frame("views", arrays={"columns": matrix.T, "every_other": matrix[:, ::2]})))
    np.testing.assert_array_equal(frame.arrays["columns"], matrix.T)
    np.testing.assert_array_equal(frame.arrays["every_other"], matrix[:, ::2])


def test_other_arrays_than_float32_and_int32_are_refused() -> None:
    wrong: Any = np.zeros(2, np.float64)
    with pytest.raises(ArealError, match="others: wrong"):
        encode(Frame("kind", arrays={"wrong": wrong, "right": np.zeros(2, np.float32)}))


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_foreign_bytes_are_refused_with_one_error(data: bytes) -> None:
    with pytest.raises(ArealError):
        decode(data)


@settings(deadline=None)
@given(st.data())
def test_a_damaged_frame_is_refused_or_another_frame(data: st.DataObject) -> None:
    whole = bytearray(encode(Frame("update", {"rate": 0.5}, {"flat": np.arange(4, dtype=np.float32)})))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ArealError):
        assert isinstance(decode(bytes(whole)), Frame)


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{}", b'{"kind": 1, "values": {}}', b'{"kind": "a", "values": []}', b"[" * 100_000]
)
def test_a_head_that_is_no_kind_and_values_is_refused(text: bytes) -> None:
    with pytest.raises(ArealError):
        decode(struct.pack("<4sIQ", MAGIC, len(text), 0) + text)


def test_a_frame_that_claims_too_much_is_refused_before_it_is_read() -> None:
    with pytest.raises(ArealError, match="at most"):
        decode(struct.pack("<4sIQ", MAGIC, MAX_JSON_BYTES + 1, 0))
    with pytest.raises(ArealError, match="at most"):
        encode(Frame("kind", {"text": "x" * (MAX_JSON_BYTES + 1)}))


def test_frames_follow_each_other_on_a_socket_until_the_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for number in range(3):
            send(ours, Frame("count", {"number": number}))
        ours.shutdown(socket.SHUT_WR)
        received = [receive(theirs) for _ in range(4)]
    assert [frame and frame.values["number"] for frame in received] == [0, 1, 2, None]


@pytest.mark.parametrize("kept", [3, 20])
def test_a_torn_frame_on_a_socket_is_an_error_and_no_end(kept: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(encode(Frame("torn", {"text": "half of it"}))[:kept])
        ours.shutdown(socket.SHUT_WR)
        with pytest.raises(ArealError, match="ends"):
            receive(theirs)


def test_nothing_in_a_frame_is_pickled() -> None:
    data = encode(Frame("kind", {"text": "plain"}, {"flat": np.zeros(3, np.float32)}))
    json_bytes, array_bytes = struct.unpack_from("<IQ", data, 4)
    assert json.loads(data[16 : 16 + json_bytes]) == {"kind": "kind", "values": {"text": "plain"}}
    header = int.from_bytes(data[16 + json_bytes : 24 + json_bytes], "little")
    assert json.loads(data[24 + json_bytes : 24 + json_bytes + header])["flat"]["dtype"] == "F32"
    assert 8 + header + 12 == array_bytes
