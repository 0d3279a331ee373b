"""Rows kept apart to measure on: chosen by their content, so that a row never changes sides when data grow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace

from fedmoe.datasets.errors import DataError
from fedmoe.datasets.formats import Sample


def is_held_out(sample: Sample, fraction: float) -> bool:
    """Whether this row is one of the `fraction` (0 to 1) that is held out; equal rows are always on the same side."""
    content = repr(replace(sample, line=0)).encode("utf-8", "surrogatepass")
    drawn = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")
    return drawn < fraction * 2.0**64


def split_rows(samples: Iterable[Sample], fraction: float) -> tuple[tuple[Sample, ...], tuple[Sample, ...]]:
    """The rows to train on and the rows held out, both in their order; raises `DataError` if one side is empty."""
    sides: tuple[list[Sample], list[Sample]] = ([], [])
    for sample in samples:
        sides[is_held_out(sample, fraction)].append(sample)
    train, held_out = map(tuple, sides)
    if not train or not held_out:
        empty = "nothing to train on" if not train else "no row held out"
        raise DataError(
            f"--eval-split {fraction:g} leaves {empty} of {len(train) + len(held_out)} rows; "
            "give another fraction, more data, or --eval-dataset FILE"
        )
    return train, held_out
