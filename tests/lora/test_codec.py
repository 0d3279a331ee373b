"""Adapters on the wire, whole or compressed (E22): what comes back, and what is refused."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from lora_cases import entry, laws, layouts, random_adapter, random_flat, raw_body

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape, ShapeError
from fedmoe.lora.codec import (
    WIRE_DTYPES,
    WireDtype,
    decode,
    decode_adapter,
    dequantise,
    digest,
    encode,
    encode_adapter,
    quantise,
    tensor_names,
)
from fedmoe.lora.safetensors_bytes import CodecError, MalformedError, MismatchError, read_header
from fedmoe.lora.update_rules import first_not_finite

LAYOUT = Layout((ModuleShape("model.q", 6, 4), ModuleShape("model.up", 3, 5)), 2)
FLAT = random_flat(LAYOUT, 0)
TINY = Layout((ModuleShape("m", 3, 2),), 2)
tiny_vectors = arrays.arrays(np.float32, TINY.size, elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def named(layout: Layout, flat: np.ndarray) -> dict[str, np.ndarray]:
    return {name: flat[start:stop].reshape(shape) for name, shape, start, stop in tensor_names(layout)}


@laws
@given(layouts(), st.integers(0, 2**32 - 1))
def test_float32_travels_bit_for_bit_not_a_number_included(layout: Layout, seed: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2**32, layout.size, np.uint32)
    decoded = decode(encode(layout, bits.view(np.float32)), layout)
    np.testing.assert_array_equal(decoded.flat.view(np.uint32), bits)
    assert decoded.wire_dtype == "fp32"


@laws
@given(arrays.arrays(np.float32, TINY.size, elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_bfloat16_is_within_2_to_the_minus_8_of_every_number(flat: np.ndarray) -> None:
    decoded = decode(encode(TINY, flat, "bf16"), TINY)
    assert decoded.wire_dtype == "bf16"
    subnormal = 2.0**-133  # the smallest bfloat16 above zero
    exact = flat.astype(np.float64)
    assert (np.abs(decoded.flat - exact) <= np.abs(exact) * 2.0**-8 + subnormal).all()


@laws
@given(tiny_vectors)
def test_int8_is_within_half_a_step_of_its_scale(flat: np.ndarray) -> None:
    numbers, scales = quantise(TINY, flat)
    decoded = decode(encode(TINY, flat, "int8"), TINY)
    assert decoded.wire_dtype == "int8"
    np.testing.assert_array_equal(decoded.flat, dequantise(TINY, numbers, scales))
    assert np.abs(numbers.astype(int)).max() <= 127
    error = np.abs(decoded.flat.astype(np.float64) - flat)
    (a, b), steps = named(TINY, error).values(), scales.astype(np.float64)
    # 1e-5 is the rounding of the float32 quotient and product; 1.5e-36 what a direction may hold and be sent as zero.
    assert (a <= 0.5 * (1 + 1e-5) * steps[0][:, None] + 1.5e-36).all()
    assert (b <= 0.5 * (1 + 1e-5) * steps[1][None, :] + 1.5e-36).all()


@pytest.mark.parametrize("largest", [0.0, 1e-45, 2e-43, 1e-38, 1.4e-36, 1.6e-36, 1.0, float(np.finfo(np.float32).max)])
def test_int8_survives_zero_subnormal_and_huge_directions(largest: float) -> None:
    flat = np.zeros(TINY.size, np.float32)
    flat[0], flat[1] = largest, -largest
    back = decode(encode(TINY, flat, "int8"), TINY).flat
    assert np.abs(back.astype(np.float64) - flat).max() <= max(largest / 250, min(1.5e-36, float(flat[0])))
    assert not back[2:].any()


def test_int8_keeps_one_scale_for_each_rank_direction() -> None:
    flat = np.ones(TINY.size, np.float32)
    for _, a, b in TINY.factors(flat):
        a[1] *= 1e-4
        b[:, 1] *= 1e6
    _, scales = quantise(TINY, flat)
    np.testing.assert_allclose(scales * 127, [[1, 1e-4], [1, 1e6]], rtol=1e-6)
    np.testing.assert_allclose(decode(encode(TINY, flat, "int8"), TINY).flat, flat, rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_not_narrowed(value: float) -> None:
    flat = FLAT.copy()
    flat[30] = value
    with pytest.raises(ValueError, match="NaN or an infinity"):
        encode(LAYOUT, flat, "int8")
    with pytest.raises(ValueError, match="bfloat16 holds finite numbers"):
        encode(LAYOUT, flat, "bf16")
    with pytest.raises(ValueError, match="bfloat16 holds finite numbers"):
        encode(LAYOUT, np.full(LAYOUT.size, 3.4e38, np.float32), "bf16")


@laws
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-3, 1.0, 1e3]))
def test_with_error_feedback_a_stream_in_int8_is_never_more_than_a_step_off(seed: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    residual = np.zeros(LAYOUT.size, np.float32)
    meant, sent = np.zeros(LAYOUT.size), np.zeros(LAYOUT.size)
    largest_step = 0.0
    for _ in range(60):
        delta = (size * rng.standard_normal(LAYOUT.size)).astype(np.float32)
        wanted = delta + residual
        numbers, scales = quantise(LAYOUT, wanted)
        arrived = dequantise(LAYOUT, numbers, scales)
        residual = wanted - arrived
        meant, sent = meant + delta, sent + arrived
        largest_step = max(largest_step, float(scales.max()))
        assert np.abs(meant - sent).max() <= largest_step


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@laws
@given(st.randoms(use_true_random=False), st.integers(0, 7))
def test_tensors_are_taken_in_any_order_and_at_any_offset(wire_dtype: WireDtype, random: object, pad: int) -> None:
    body = encode(LAYOUT, FLAT, wire_dtype, {"k": "v"})
    entries, _, data = read_header(body)
    shuffled = list(entries.items())
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    header: dict[str, object] = {"__metadata__": {"k": "v"}}
    parts, offset = [], 0
    for name, found in shuffled:
        parts.append(bytes(data[found.start : found.stop]))
        header[name] = entry(found.dtype, list(found.shape), offset, offset + len(parts[-1]))
        offset += len(parts[-1])
    mixed = decode(raw_body(json.dumps(header).encode() + b" " * pad, b"".join(parts)), LAYOUT)
    straight = decode(body, LAYOUT)
    np.testing.assert_array_equal(mixed.flat, straight.flat)
    assert (mixed.wire_dtype, mixed.metadata) == (wire_dtype, {"k": "v"})
    assert mixed.flat.flags.aligned


def test_the_safetensors_library_reads_what_we_write() -> None:
    for name, values in safetensors.numpy.load(encode(LAYOUT, FLAT)).items():
        np.testing.assert_array_equal(values, named(LAYOUT, FLAT)[name])
    numbers, scales = quantise(LAYOUT, FLAT)
    read = safetensors.numpy.load(encode(LAYOUT, FLAT, "int8"))
    assert len(read) == 8
    for index, (name, values) in enumerate(named(LAYOUT, numbers).items()):
        np.testing.assert_array_equal(read[name], values)
        np.testing.assert_array_equal(read[f"{name}.scale"], scales[index])
    narrow = dict(safetensors.deserialize(encode(LAYOUT, FLAT, "bf16")))  # type: ignore[no-untyped-call]
    for name, values in named(LAYOUT, FLAT).items():
        assert (narrow[name]["dtype"], narrow[name]["shape"]) == ("BF16", list(values.shape))
        assert narrow[name]["data"] == values.astype(ml_dtypes.bfloat16).tobytes()


def test_we_read_what_the_safetensors_library_writes() -> None:
    tensors = named(LAYOUT, FLAT)
    np.testing.assert_array_equal(decode(safetensors.numpy.save(tensors), LAYOUT).flat, FLAT)
    halves = {name: values.astype(ml_dtypes.bfloat16) for name, values in tensors.items()}
    expected = FLAT.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(decode(safetensors.numpy.save(halves), LAYOUT).flat, expected)


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_a_decoded_vector_is_read_only_whatever_it_came_from(wire_dtype: WireDtype) -> None:
    for body in (encode(LAYOUT, FLAT, wire_dtype), bytearray(encode(LAYOUT, FLAT, wire_dtype))):
        assert not decode(body, LAYOUT).flat.flags.writeable


def test_an_aligned_float32_body_is_not_copied() -> None:
    body = encode(LAYOUT, FLAT)
    assert np.shares_memory(decode(body, LAYOUT).flat, np.frombuffer(body, np.uint8))


def test_a_read_only_or_strided_vector_is_encoded_like_a_plain_one() -> None:
    strided = np.repeat(FLAT, 2)[::2]
    strided.flags.writeable = False
    for wire_dtype in WIRE_DTYPES:
        assert encode(LAYOUT, strided, wire_dtype) == encode(LAYOUT, FLAT, wire_dtype)


def test_a_vector_that_is_not_the_layouts_is_not_encoded() -> None:
    for flat in (FLAT[1:], FLAT.reshape(2, -1), FLAT.astype(np.float64).view(np.float32)):
        with pytest.raises(ShapeError, match="float32"):
            encode(LAYOUT, flat)
    with pytest.raises(ShapeError, match="float64"):
        encode(LAYOUT, FLAT.astype(np.float64))


def refused(body: bytes, layout: Layout = LAYOUT) -> tuple[str, str]:
    with pytest.raises(MismatchError) as caught:
        decode(body, layout)
    assert len(str(caught.value)) < 1000
    return caught.value.code, str(caught.value)


def test_missing_and_unexpected_tensors_are_counted_and_five_of_each_listed() -> None:
    tensors = named(LAYOUT, FLAT)
    del tensors["model.q.lora_A"]
    tensors |= {f"extra{number}": np.zeros(1, np.float32) for number in range(9)}
    code, text = refused(safetensors.numpy.save(tensors))
    assert code == "tensor_mismatch"
    assert text.startswith("10 tensors differ from the manifest: missing 'model.q.lora_A'; not expected 'extra0'")
    assert "extra4" in text
    assert "extra5" not in text


@pytest.mark.parametrize("name", ["../model.q.lora_A", "model.q.lora_A\x00", "\x00", "/etc/passwd", "model.q.lora_a"])
def test_a_name_that_only_looks_right_is_not_expected(name: str) -> None:
    tensors = named(LAYOUT, FLAT)
    tensors[name] = tensors.pop("model.q.lora_A")
    code, text = refused(safetensors.numpy.save(tensors))
    assert code == "tensor_mismatch"
    assert text.isprintable()


def test_another_rank_is_called_by_that_name() -> None:
    code, text = refused(encode(LAYOUT.with_rank(8), random_flat(LAYOUT.with_rank(8), 0)))
    assert (code, text) == ("rank_mismatch", "'model.q.lora_A': expected rank 2, got rank 8")
    code, _ = refused(encode(LAYOUT.with_rank(8), random_flat(LAYOUT.with_rank(8), 0), "int8"))
    assert code == "rank_mismatch"


def test_swapped_factors_and_other_shapes_are_shape_mismatches() -> None:
    square = Layout((ModuleShape("m", 4, 4),), 2)
    tensors = named(square, random_flat(square, 0))
    swapped = {"m.lora_A": tensors["m.lora_B"], "m.lora_B": tensors["m.lora_A"]}
    assert refused(safetensors.numpy.save(swapped), square)[0] == "shape_mismatch"
    assert "A is r x in" in refused(safetensors.numpy.save(swapped), square)[1]
    for shape in ((2, 5), (8,), (2, 2, 2), ()):
        tensors["m.lora_A"] = np.zeros(shape, np.float32)
        assert refused(safetensors.numpy.save(tensors), square)[0] == "shape_mismatch"


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.int32, np.uint8, np.bool_])
def test_dtypes_nobody_agreed_on_are_refused(dtype: type) -> None:
    tensors: dict[str, np.ndarray] = {
        name: np.ones(values.shape, dtype) for name, values in named(LAYOUT, FLAT).items()
    }
    assert refused(safetensors.numpy.save(tensors))[0] == "dtype_not_accepted"


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F4", "unknown"])
def test_eight_bit_floats_and_unknown_dtypes_are_refused(dtype: str) -> None:
    header = {name: entry(dtype, list(shape), start, stop) for name, shape, start, stop in tensor_names(LAYOUT)}
    assert refused(raw_body(header, bytes(LAYOUT.size)))[0] == "dtype_not_accepted"


def test_dtypes_are_not_mixed() -> None:
    tensors = named(LAYOUT, FLAT)
    mixed = tensors | {"model.q.lora_A": tensors["model.q.lora_A"].astype(ml_dtypes.bfloat16)}
    assert refused(safetensors.numpy.save(mixed))[0] == "dtype_not_accepted"
    scaled = safetensors.numpy.load(encode(LAYOUT, FLAT, "int8"))
    scaled["model.q.lora_A.scale"] = scaled["model.q.lora_A.scale"].astype(np.float64)
    assert refused(safetensors.numpy.save(scaled))[0] == "dtype_not_accepted"
    del scaled["model.q.lora_A.scale"]
    assert refused(safetensors.numpy.save(scaled))[0] == "tensor_mismatch"


@laws
@given(layouts(), st.integers(0, 1 << 32), st.floats(0.01, 1000))
def test_a_whole_adapter_travels_bit_for_bit_with_its_shape_and_alpha(layout: Layout, seed: int, alpha: float) -> None:
    adapter = Adapter(layout, alpha, random_flat(layout, seed))
    received = decode_adapter(encode_adapter(adapter))
    assert (received.layout, received.alpha) == (layout, alpha)
    assert digest(received) == digest(adapter)
    np.testing.assert_array_equal(received.flat.view(np.uint32), adapter.flat.view(np.uint32))


@pytest.mark.parametrize("left_out", ["lora_A", "lora_B", "alpha"])
def test_bytes_that_are_no_whole_adapter_are_refused(left_out: str) -> None:
    layout = Layout((ModuleShape("q", 3, 2),), 1)
    tensors = {name: np.zeros(shape, np.float32) for name, shape, _, _ in tensor_names(layout) if left_out not in name}
    metadata = {"alpha": "2.0"} if left_out != "alpha" else {}
    with pytest.raises(MalformedError, match="no whole adapter: lora_A, lora_B and alpha are needed"):
        decode_adapter(safetensors.numpy.save(tensors, metadata))


def test_a_body_without_tensors_is_refused() -> None:
    assert refused(raw_body({}))[0] == "dtype_not_accepted"


@pytest.mark.parametrize("scale", [np.nan, np.inf, 3e38, -3e38])
def test_int8_scales_from_outside_that_blow_up_are_left_for_the_finite_check_to_name(scale: float) -> None:
    tensors = safetensors.numpy.load(encode(LAYOUT, np.full(LAYOUT.size, 2.0, np.float32), "int8"))
    tensors["model.up.lora_B.scale"][1] = scale
    assert first_not_finite(LAYOUT, decode(safetensors.numpy.save(tensors), LAYOUT).flat) == "model.up.lora_B"


def test_signalling_not_a_numbers_in_bfloat16_are_left_for_the_finite_check_to_name() -> None:
    body = bytearray(encode(LAYOUT, FLAT, "bf16"))
    body[-2:] = struct.pack("<H", 0x7F81)
    assert first_not_finite(LAYOUT, decode(body, LAYOUT).flat) == "model.up.lora_B"


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@laws
@given(st.data())
def test_a_damaged_body_is_decoded_or_refused_and_nothing_else(wire_dtype: WireDtype, data: st.DataObject) -> None:
    body = bytearray(encode(LAYOUT, FLAT, wire_dtype, {"worker": "w1"}))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        change = data.draw(st.sampled_from(["set", "cut", "insert", "remove"]))
        if change == "set":
            body[place] = data.draw(st.integers(0, 255))
        elif change == "cut":
            del body[max(place, 1) :]
        elif change == "insert":
            body[place:place] = data.draw(st.binary(min_size=1, max_size=8))
        elif len(body) > 8:
            del body[place : place + data.draw(st.integers(1, 7))]
    try:
        decoded = decode(bytes(body), LAYOUT)
    except CodecError as error:
        refusal: CodecError | None = error
    else:
        refusal = None
        assert decoded.flat.shape == (LAYOUT.size,)
    malformed, mismatched = ("malformed", "duplicate_key"), ("tensor_mismatch", "dtype_not_accepted", "shape_mismatch")
    if isinstance(refusal, MalformedError):
        assert refusal.code in malformed
    elif refusal is not None:
        assert isinstance(refusal, MismatchError)
        assert refusal.code in (*mismatched, "rank_mismatch")


def test_a_digest_is_of_layout_alpha_and_numbers() -> None:
    adapter = random_adapter(LAYOUT, 0)
    assert digest(adapter) == digest(Adapter(LAYOUT, 16.0, FLAT.copy()))
    assert len(digest(adapter)) == 64
    other_names = Layout((ModuleShape("model.q", 6, 4), ModuleShape("model.uq", 3, 5)), 2)
    changed = FLAT.copy()
    changed[-1] = np.nextafter(changed[-1], np.float32(9))
    others = [Adapter(LAYOUT, 8.0, FLAT), Adapter(LAYOUT, 16.0, changed), Adapter(other_names, 16.0, FLAT)]
    assert len({digest(adapter), *map(digest, others)}) == 4
