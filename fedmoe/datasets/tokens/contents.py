"""What data hold, whatever their order: a hash of every sample, and what was added or taken away since."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmoe.datasets.tokens.packing import Block

#: One number a sample, sorted; equal samples stand in it as often as they are there.
Hashes = NDArray[np.uint64]


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


def sample_hashes(blocks: Sequence[Block]) -> Hashes:
    """A hash of the tokens and labels of every packed sample, uint64 (samples,), sorted: independent of their order."""
    found = [_hash(block, start, stop) for block in blocks for start, stop in _spans(block)]
    return np.sort(np.array(found, np.uint64))


def _spans(block: Block) -> list[tuple[int, int]]:
    used = int(np.count_nonzero(block.segment_ids >= 0))
    starts = np.flatnonzero(block.position_ids[:used] == 0).tolist()
    return list(zip(starts, [*starts[1:], used], strict=True))


def _hash(block: Block, start: int, stop: int) -> int:
    # 64 bits: among a million samples two different ones are alike with a chance of 1 in 37 million.
    digest = hashlib.blake2b(np.ascontiguousarray(block.input_ids[start:stop]).tobytes(), digest_size=8)
    digest.update(np.ascontiguousarray(block.labels[start:stop]).tobytes())
    return int.from_bytes(digest.digest(), "little")


def digest_of(hashes: Hashes) -> str:
    """A name for data with these samples: 32 hexadecimal digits."""
    return hashlib.blake2b(hashes.astype("<u8").tobytes(), digest_size=16).hexdigest()


def change_between(before: Hashes, now: Hashes) -> DataChange:
    """What happened to the samples `before`; equal ones are counted one by one."""
    old, old_counts = np.unique(before, return_counts=True)
    new, new_counts = np.unique(now, return_counts=True)
    _, in_old, in_new = np.intersect1d(old, new, assume_unique=True, return_indices=True)
    kept = int(np.minimum(old_counts[in_old], new_counts[in_new]).sum())
    return DataChange(kept, before.size - kept, now.size - kept)
