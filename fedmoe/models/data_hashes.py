"""The hashes of the samples that a checkpoint was trained on, in one file that is written only when the data change.

    data-<digest>.safetensors          8 bytes a sample; the checkpoint names the digest

The file is there before the checkpoint that names it, and others go once that checkpoint is the newest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.packing import Block
from fedmoe.runtime.files import write_atomic

DIGEST = "digest"
_FILE = re.compile(r"^(data-[0-9a-f]{32}\.safetensors|\.data-[0-9a-f]{32}\.safetensors-[0-9a-f]{8})$")
_NAME = "samples"
#: One number a sample, sorted; equal samples stand in it as often as they are there.
SampleHashes = NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class DataChange:
    """How many samples of the earlier data are still there, are gone or changed, and how many are new."""

    unchanged: int
    missing: int
    new: int

    @property
    def grown(self) -> bool:
        """Whether nothing that was there is missing: the same data in another order, or more of them."""
        return self.missing == 0


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
    unchanged = int(np.minimum(old_counts[in_old], new_counts[in_new]).sum())
    return DataChange(unchanged, before.size - unchanged, now.size - unchanged)


def write_hashes(folder: Path, hashes: SampleHashes) -> str:
    """Make sure that `folder` holds these hashes; returns their digest."""
    digest = digest_of(hashes)
    file = _file(folder, digest)
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, save({_NAME: hashes}))
    return digest


def read_hashes(folder: Path, digest: str) -> SampleHashes | None:
    """The hashes of that digest; None if they are missing or damaged."""
    try:
        hashes: SampleHashes = load(_file(folder, digest).read_bytes())[_NAME]
    except (OSError, SafetensorError, KeyError):
        return None
    return hashes if hashes.dtype == np.uint64 and digest_of(hashes) == digest else None


def remove_other_hashes(folder: Path, digest: str) -> None:
    """Remove the hashes of data that no checkpoint is of any more."""
    for file in folder.iterdir():
        if _FILE.match(file.name) and file != _file(folder, digest):
            file.unlink()


def check_data_change(
    folder: Path, saved: Mapping[str, object], now: SampleHashes, allow_changed: bool
) -> DataChange | None:
    """How the data changed since a checkpoint that says `saved` of them; None where that cannot be told.

    Raises `DataError` naming the flag when samples are gone or changed, or it cannot be told, and `allow_changed` is
    not set.
    """
    before = read_hashes(folder, str(saved.get(DIGEST, "")))
    change = change_between(before, now) if before is not None else None
    if allow_changed or (change is not None and change.grown):
        return change
    what = (
        f"{change.missing} of {change.missing + change.unchanged} samples are gone or changed, {change.new} are new"
        if change is not None
        else f"it has no list of their samples, so whether the {now.size} of now only grew cannot be told"
    )
    raise DataError(
        f"the checkpoint is of other data: {what}. Give the earlier data, --max-length and --eval-split again, or add "
        "--allow-changed-data to keep weights, moments and step and go on with these"
    )


def _file(folder: Path, digest: str) -> Path:
    return folder / f"data-{digest}.safetensors"
