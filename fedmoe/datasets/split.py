"""Held-out split: rows are chosen by their content, so that a row never changes sides when data grow."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedmoe.datasets.formats.samples import Sample
from fedmoe.datasets.readers.common import DataError

#: One number a row, drawn from its content.
RowHashes = NDArray[np.uint64]


def row_hash(sample: Sample) -> int:
    """64 bits of a row's content, wherever it stands; equal rows have equal ones.

    The names of the sample's classes and fields are part of it, so they must not change.
    """
    content = repr(replace(sample, line=0, file="")).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def held_out_rows(hashes: RowHashes, fraction: float) -> NDArray[np.bool_]:
    """Which of these rows are among the `fraction` (0 to 1) that is held out; raises `DataError` for an empty side."""
    held_out = hashes.astype(np.float64) < fraction * 2.0**64
    if held_out.all() or not held_out.any():
        empty = "nothing to train on" if held_out.any() else "no row held out"
        raise DataError(
            f"--eval-split {fraction:g} leaves {empty} of {len(set(hashes.tolist()))} different rows; "
            "give another fraction, more data, or --eval-dataset FILE"
        )
    return held_out
