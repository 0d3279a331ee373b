"""Packed arrays (E20, E22): smaller, and the same bits again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedmoe.arena.run.adapter_files import pack, unpack


@given(hnp.arrays(np.uint32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=7)))
def test_every_float_comes_back_bit_for_bit(bits: np.ndarray) -> None:
    array = np.asarray(bits).view(np.float32)
    back = unpack(pack(array))
    assert back.shape == array.shape
    assert back.dtype == np.float32
    assert back.tobytes() == array.tobytes()


def test_packing_makes_trained_numbers_smaller_e20() -> None:
    rng = np.random.default_rng(0)
    scales = np.exp(rng.normal(size=100_000))
    array = (rng.normal(size=100_000) * scales * 1e-3).astype(np.float32)
    assert len(pack(array)) < 0.88 * array.nbytes


@given(st.binary(max_size=60) | st.binary(max_size=30).map(lambda tail: pack(np.ones(9, np.float32))[:-1] + tail))
def test_bytes_that_are_no_packed_array_are_a_value_error(data: bytes) -> None:
    try:
        unpack(data)
    except ValueError:
        return
    assert unpack(data).dtype == np.float32


def test_only_float32_is_packed() -> None:
    with pytest.raises(TypeError, match="float64"):
        pack(np.ones(3))  # type: ignore[arg-type]
