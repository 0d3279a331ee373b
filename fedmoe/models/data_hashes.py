"""The hashes of the samples that a checkpoint was trained on, in one file that is written only when the data change.

    data-<digest>.safetensors          8 bytes a sample; the checkpoint names the digest

The file is there before the checkpoint that names it, and others go once that checkpoint is the newest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.sample_hashes import DataChange, SampleHashes, change_between, digest_of
from fedmoe.runtime.files import write_atomic

DIGEST = "digest"
_FILE = re.compile(r"^(data-[0-9a-f]{32}\.safetensors|\.data-[0-9a-f]{32}\.safetensors-[0-9a-f]{8})$")
_NAME = "samples"


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
        f"{change.gone} of {change.gone + change.kept} samples are gone or changed, {change.new} are new"
        if change is not None
        else f"it has no list of their samples, so whether the {now.size} of now only grew cannot be told"
    )
    raise DataError(
        f"the checkpoint is of other data: {what}. Give the earlier data, --max-length and --eval-split again, or add "
        "--allow-changed-data to keep weights, moments and step and go on with these"
    )


def _file(folder: Path, digest: str) -> Path:
    return folder / f"data-{digest}.safetensors"
