"""What the reader must refuse before any layout is known: rows 26-34 of the fault list, each by its code."""

from __future__ import annotations

import json
import math

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import entry, laws, raw_body
from numpy.typing import NDArray

from fedmoe.lora.safetensors_bytes import (
    MAX_HEADER_BYTES,
    MAX_METADATA_CHARACTERS,
    CodecError,
    MalformedError,
    MismatchError,
    encode_named,
    read_header,
    read_named,
)

HALF_PAIR = b'{"\\ud800":{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}'
ONE = entry("F32", [1], 0, 4)
MALFORMED = {
    "empty": b"",
    "seven bytes": bytes(7),
    "no header": bytes(8),
    "header of 2^63 bytes": (1 << 63).to_bytes(8, "little") + b"{}",
    "header longer than the body": (3).to_bytes(8, "little") + b"{}",
    "header over the limit": (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{" + bytes(MAX_HEADER_BYTES + 100),
    "not JSON": raw_body(b"{x"),
    "leading space": raw_body(b" {}"),
    "byte order mark": raw_body(b"\xef\xbb\xbf{}"),
    "not UTF-8": raw_body(b'{"\xff":1}'),
    "array": raw_body([]),
    "number": raw_body(b"7"),
    "nesting 50,000": raw_body(b'{"a":' * 50_000),
    "list nesting 50,000": raw_body(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "integer of 5,000 digits": raw_body(b'{"a":{"dtype":"I8","shape":[' + b"1" * 5000 + b'],"data_offsets":[0,0]}}'),
    "half a surrogate pair as a name": raw_body(HALF_PAIR),
    "tensor is a number": raw_body({"a": 1}),
    "tensor is null": raw_body({"a": None}),
    "field missing": raw_body({"a": {"dtype": "F32", "shape": [0]}}),
    "field too many": raw_body({"a": {**entry("F32", [0], 0, 0), "device": "cpu"}}),
    "dtype is a list": raw_body({"a": {"dtype": [], "shape": [0], "data_offsets": [0, 0]}}),
    "shape is a number": raw_body({"a": {"dtype": "F32", "shape": 0, "data_offsets": [0, 0]}}),
    "negative dimension": raw_body({"a": entry("F32", [-1], 0, 0)}),
    "two negative dimensions": raw_body({"a": entry("F32", [-1, -1], 0, 4)}, bytes(4)),
    "dimension as bool": raw_body({"a": entry("F32", [True], 0, 4)}, bytes(4)),
    "dimension as float": raw_body(b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}', bytes(4)),
    "dimension as NaN": raw_body(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    "offset as bool": raw_body({"a": entry("I8", [1], False, True)}, bytes(1)),
    "offset as text": raw_body(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":["0","4"]}}', bytes(4)),
    "negative offset": raw_body({"a": entry("F32", [1], -4, 0)}, bytes(4)),
    "one offset": raw_body({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0]}}),
    "three offsets": raw_body({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0, 0]}}),
    "offsets backwards": raw_body({"a": entry("X9", [1], 4, 0)}, bytes(4)),
    "shape of 2^62": raw_body({"a": entry("F32", [1 << 62], 0, 4)}, bytes(4)),
    "shape that overflows 64 bits to zero": raw_body({"a": entry("F32", [1 << 32, 1 << 32], 0, 0)}),
    "100,000 dimensions": raw_body({"a": entry("F32", [1] * 100_000, 0, 4)}, bytes(4)),
    "shape of more bytes than offsets": raw_body({"a": entry("F32", [2], 0, 4)}, bytes(4)),
    "shape of more bytes than offsets, F64": raw_body({"a": entry("F64", [1], 0, 4)}, bytes(4)),
    "end beyond the body": raw_body({"a": entry("F32", [2], 0, 8)}, bytes(4)),
    "overlap": raw_body({"a": ONE, "b": entry("F32", [1], 2, 6)}, bytes(6)),
    "same bytes twice": raw_body({"a": ONE, "b": ONE}, bytes(4)),
    "hole": raw_body({"a": ONE, "b": entry("F32", [1], 8, 12)}, bytes(12)),
    "hole at the start": raw_body({"a": entry("F32", [1], 4, 8)}, bytes(8)),
    "trailing bytes": raw_body({"a": ONE}, bytes(5)),
    "bytes without a tensor": raw_body({}, bytes(5)),
    "metadata is a list": raw_body({"__metadata__": []}),
    "metadata of numbers": raw_body({"__metadata__": {"a": 1}}),
    "metadata is huge": raw_body({"__metadata__": {"a": "x" * MAX_METADATA_CHARACTERS}}),
    "metadata with half a surrogate pair": raw_body(b'{"__metadata__":{"a":"\\udc00"}}'),
}
DUPLICATES = {
    "tensor twice": b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2),
    "metadata twice": b'{"__metadata__":{},"__metadata__":{}}',
    "field twice": b'{"a":{"dtype":"F32","dtype":"I8","shape":[1],"data_offsets":[0,4]}}',
    "escaped the second time": b'{"a":1,"\\u0061":1}',
    "170,000 names, each twice or more": b"{" + b'"a":1,"b":1,' * 80_000 + b'"a":1}',
}


@pytest.mark.parametrize("fault", sorted(MALFORMED))
def test_a_malformed_body_is_refused_as_malformed(fault: str) -> None:
    """Fault 39."""
    with pytest.raises(MalformedError) as caught:
        read_header(MALFORMED[fault])
    assert caught.value.code == "malformed"
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("fault", sorted(DUPLICATES))
def test_a_repeated_key_is_refused(fault: str) -> None:
    """Fault 30."""
    with pytest.raises(MalformedError) as caught:
        read_header(raw_body(DUPLICATES[fault], bytes(4)))
    assert caught.value.code == "duplicate_key"
    assert len(str(caught.value)) < 1000


def test_a_hundred_thousand_tensors_do_not_fit_under_the_header_limit() -> None:
    """Fault 31."""
    tensors = {f"{number:x}": entry("I8", [], number, number + 1) for number in range(100_000)}
    with pytest.raises(MalformedError, match="at most 1048576 are read"):
        read_header(raw_body(tensors, bytes(100_000)))
    with pytest.raises(MalformedError, match="at most 1048576 are read"):
        encode_named({f"{number:x}": np.zeros(0, np.float32) for number in range(30_000)})


@pytest.mark.parametrize("name", ["\x00", "../../etc/passwd", "a\nb\x1b[31m", "x" * 100_000, "ä€😀", ""])
def test_a_name_is_only_a_name_and_never_shown_raw(name: str) -> None:
    """Fault 39."""
    entries, _, _ = read_header(raw_body({name: ONE}, bytes(4)))
    assert list(entries) == [name]
    with pytest.raises(MalformedError) as caught:
        read_header(raw_body({name: ONE}, bytes(5)[:3]))
    with pytest.raises(MismatchError) as refused:
        read_named(raw_body({name: entry("I64", [1], 0, 8)}, bytes(8)))
    for error in (caught.value, refused.value):
        assert len(str(error)) < 500
        assert str(error).isprintable()


@pytest.mark.parametrize(
    "dtype", ["F64", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "__class__", "z" * 5000]
)
def test_named_reading_takes_no_other_dtype(dtype: str) -> None:
    size = {"F64": 8, "I64": 8}.get(dtype, 1)
    with pytest.raises(MismatchError) as caught:
        read_named(raw_body({"a": entry(dtype, [3], 0, 3 * size)}, bytes(3 * size)))
    assert caught.value.code == "dtype_not_accepted"
    assert len(str(caught.value)) < 500


names = st.text(st.characters(codec="utf-8"), max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)
metadata_texts = st.dictionaries(
    st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), max_size=3
)


@laws
@given(st.dictionaries(names, shapes, max_size=5), metadata_texts)
def test_what_is_written_by_name_is_read_back_in_the_same_order(
    named: dict[str, tuple[int, ...]], metadata: dict[str, str]
) -> None:
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in named.items()}
    body = encode_named(tensors, metadata)
    entries, found, _ = read_header(body)
    assert found == metadata
    assert list(entries) == list(tensors)
    again = read_named(body)
    for name, values in tensors.items():
        assert again[name].shape == values.shape
        np.testing.assert_array_equal(again[name], values)


def test_the_safetensors_library_reads_ours_and_we_read_theirs() -> None:
    rng = np.random.default_rng(1)
    tensors: dict[str, NDArray[np.float32]] = {
        name: rng.standard_normal((3, size)).astype(np.float32) for name, size in (("b", 2), ("a", 5), ("c", 0))
    }
    for read in (safetensors.numpy.load(encode_named(tensors)), read_named(safetensors.numpy.save(tensors))):
        assert read.keys() == tensors.keys()
        for name, values in tensors.items():
            np.testing.assert_array_equal(read[name], values)


@pytest.mark.parametrize("stored", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_float32(stored: type) -> None:
    values: NDArray[np.floating] = np.array([[1.5, -0.0, np.inf]], stored)
    read = read_named(safetensors.numpy.save({"a": values}))["a"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, values.astype(np.float32))


@pytest.mark.parametrize("padding", range(1, 8))
def test_data_that_starts_anywhere_and_buffers_of_any_kind_are_read(padding: int) -> None:
    header = json.dumps({"a": entry("F32", [3], 0, 12)}).encode()
    header += b" " * ((padding - len(header)) % 8)
    body = raw_body(header, np.arange(3, dtype="<f4").tobytes())
    assert len(body) % 4 == padding % 4
    words = memoryview(body[: len(body) // 4 * 4]).cast("I") if padding == 4 else body
    for buffer in (body, bytearray(body), memoryview(body), memoryview(b"x" + body)[1:], words):
        read = read_named(buffer)["a"]
        np.testing.assert_array_equal(read, [0, 1, 2])
        assert read.flags.aligned


def test_the_metadata_name_is_not_free_for_a_tensor() -> None:
    with pytest.raises(MalformedError, match="__metadata__"):
        encode_named({"__metadata__": np.zeros(1, np.float32)})


def test_what_the_reader_would_refuse_is_not_written() -> None:
    with pytest.raises(MalformedError, match="characters"):
        encode_named({}, {"a": "x" * MAX_METADATA_CHARACTERS})
    with pytest.raises(MalformedError, match="surrogate"):
        encode_named({}, {"a": "\ud800"})


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
near_tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I8", "F64", "?"]) | json_values,
        "shape": st.lists(st.integers(-1, 3) | json_values, max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-4, 16) | json_values, min_size=1, max_size=3) | json_values,
    }
)


@laws
@given(
    st.dictionaries(st.text(max_size=4), near_tensors | json_values, max_size=3) | json_values, st.binary(max_size=16)
)
def test_any_json_as_a_header_is_read_or_refused(header: object, data: bytes) -> None:
    try:
        entries, _, rest = read_header(raw_body(header, data))
    except CodecError:
        return
    assert sum(found.stop - found.start for found in entries.values()) == len(rest) == len(data)
    assert all(math.prod(found.shape) >= 0 for found in entries.values())
