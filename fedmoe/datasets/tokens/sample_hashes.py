"""Order-independent hashes of packed samples, and what was added or removed between two sets of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmoe.datasets.tokens.packing import Block

#: One number a sample, sorted; equal samples stand in it as often as they are there.
SampleHashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class DataChange:
    """How many samples of the earlier data are still there, are gone or changed, and how many are new."""

    kept: int
    gone: int
    new: int

    @property
    def grown(self) -> bool:
        """Whether nothing that was there is missing: the same data in another order, or more of them."""
        return self.gone == 0


def sample_hashes(blocks: Sequence[Block]) -> SampleHashes:
    """A hash of the tokens and labels of every packed sample, uint64 (samples,), sorted: independent of their order."""
    hashes = []
    for block in blocks:
        used = int(np.count_nonzero(block.segment_ids >= 0))
        starts = np.flatnonzero(block.position_ids[:used] == 0).tolist()
        for start, stop in zip(starts, [*starts[1:], used], strict=True):
            # 64 bits: among a million samples two different ones are alike with a chance of 1 in 37 million.
            digest = hashlib.blake2b(block.input_ids[start:stop].tobytes(), digest_size=8)
            digest.update(block.labels[start:stop].tobytes())
            hashes.append(int.from_bytes(digest.digest(), "little"))
    return np.sort(np.array(hashes, np.uint64))


def digest_of(hashes: SampleHashes) -> str:
    """A name for data with these samples: 32 hexadecimal digits."""
    return hashlib.blake2b(hashes.astype("<u8").tobytes(), digest_size=16).hexdigest()


def change_between(before: SampleHashes, now: SampleHashes) -> DataChange:
    """What happened to the samples `before`; equal ones are counted one by one."""
    old, old_counts = np.unique(before, return_counts=True)
    new, new_counts = np.unique(now, return_counts=True)
    _, in_old, in_new = np.intersect1d(old, new, assume_unique=True, return_indices=True)
    kept = int(np.minimum(old_counts[in_old], new_counts[in_new]).sum())
    return DataChange(kept, before.size - kept, now.size - kept)
