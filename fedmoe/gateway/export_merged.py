"""Exports the base model with an adapter merged into its weights, as an ordinary checkpoint folder.

The checkpoint's files are copied and the adapted weights changed in place, a band of rows at a time, so that memory
holds one band and never the model.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from safetensors import safe_open

from fedmoe.gateway.export import (
    MANIFEST_NAME,
    ExportError,
    ExportSource,
    check_base,
    check_untied,
    file_hashes,
    read_config,
)
from fedmoe.lora.adapter import Adapter, FloatMatrix
from fedmoe.lora.algebra import baked
from fedmoe.models.identity import checkpoint_files, weights_hash
from fedmoe.runtime.files import whole_folder, write_atomic

#: Rows are taken in bands of about this many numbers: 64 MB in float32.
_BAND = 1 << 24
_Stored = np.memmap[tuple[int, ...], np.dtype[np.floating]]
_DTYPES: dict[str, np.dtype[np.floating]] = {
    "F32": np.dtype("<f4"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
}
#: What belongs to a checkpoint beside its weights; other things in a base folder are not copied.
_BESIDE = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt", "LICENSE*")
_OTHER_BITS = 1e-3
_NOT_COPIED = (MANIFEST_NAME, "pytorch_model.bin.index.json")


@dataclass(frozen=True, slots=True)
class _StoredWeight:
    """Where a stored weight lies: file, dtype name of the format, shape, first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def export_merged(source: ExportSource, base_folder: Path, target: Path, force: bool = False) -> float:
    """Write the merged checkpoint: base dtype kept, sums in float32, config and tokenizer as they are; returns what
    storing the sums in the base model's dtype lost, as a share of the norm of all products.

    Checked after writing. Raises ExportError when the base model is another one, its weights are not stored as
    float32, bfloat16 or float16, or it lacks a module.
    """
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; choose another place or pass --force to replace it")
    if target.resolve() == base_folder.resolve():
        raise ExportError(f"{target} is the base model itself; choose another place")
    check_base(f"{source.name} was", source.base, str(base_folder), weights_hash(base_folder))
    check_untied(source, read_config(base_folder))
    places = _places(source, base_folder)
    with whole_folder(target) as folder:
        for path in {*checkpoint_files(base_folder), *(path for mask in _BESIDE for path in base_folder.glob(mask))}:
            if path.is_file() and path.name not in _NOT_COPIED:
                # Contents only: the base may be read-only, or links into a cache.
                shutil.copyfile(path, folder / path.name)
        error = product = 0.0
        adapter = baked(source.adapter)
        for module, a, b in adapter.factors():
            place = places[module.name]
            lost, added = _add(folder / place.file.name, place, a, b)
            error, product = error + lost, product + added
        _check(folder, adapter, places)
        libraries = ("numpy", "ml-dtypes", "safetensors")
        relative = math.sqrt(error / product) if product > 0 else 0.0
        manifest = source.manifest("merged", file_hashes(folder), libraries, relative_rounding_error=relative)
        write_atomic(folder / MANIFEST_NAME, manifest, 0o644)
    return relative


def _places(source: ExportSource, base_folder: Path) -> dict[str, _StoredWeight]:
    """Where each adapted module's weight lies; everything that could go wrong later is refused here."""
    stored = {name: place for file in checkpoint_files(base_folder) for name, place in _stored(file)}
    places = {}
    for module in source.adapter.layout.modules:
        place = stored.get(f"{module.name}.weight")
        if place is None:
            raise ExportError(f"{base_folder} stores no {module.name}.weight; it cannot be merged, export it as peft")
        if place.dtype not in _DTYPES:
            raise ExportError(
                f"{module.name}.weight is stored as {place.dtype}; products are added to {', '.join(_DTYPES)} only, "
                "so merge into the model before it was quantised"
            )
        shape = module.out_features, module.in_features
        if place.shape != shape:
            raise ExportError(f"{module.name}.weight has shape {place.shape}, the adapter fits {shape}")
        places[module.name] = place
    return places


def _stored(file: Path) -> Iterator[tuple[str, _StoredWeight]]:
    """The tensors of a safetensors file; `weights_hash` has read the same header and found it whole."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    for name, entry in header.items():
        if name != "__metadata__":
            yield (
                name,
                _StoredWeight(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]),
            )


def _open(file: Path, place: _StoredWeight, mode: Literal["r", "r+"]) -> _Stored:
    opened: _Stored = np.memmap(file, _DTYPES[place.dtype], mode, place.offset, place.shape)
    return opened


def _add(file: Path, place: _StoredWeight, a: FloatMatrix, b: FloatMatrix) -> tuple[float, float]:
    """W += B @ A, in float32 and then the stored dtype; the squared norms of the rounding error and of the product."""
    weights = _open(file, place, "r+")
    error = energy = 0.0
    rows = _rows(a)
    for start in range(0, len(b), rows):
        band = slice(start, start + rows)
        product: FloatMatrix = b[band] @ a
        exact = weights[band].astype(np.float32) + product
        with np.errstate(over="ignore"):  # an overflow is refused below, by name
            stored = exact.astype(weights.dtype)
        if not np.isfinite(stored.astype(np.float32)).all():
            largest = f"{np.abs(exact).max():g}"
            raise ExportError(f"a merged weight does not fit into {place.dtype}: the largest is {largest}")
        weights[band] = stored
        lost = stored.astype(np.float32) - exact
        error, energy = error + float(np.vdot(lost, lost)), energy + float(np.vdot(product, product))
    weights.flush()
    return error, energy


def _rows(a: FloatMatrix) -> int:
    """Rows of a band, for a module with the columns of A."""
    return max(1, _BAND // int(a.shape[1]))


def _check(folder: Path, adapter: Adapter, places: Mapping[str, _StoredWeight]) -> None:
    """Read the first band of one module back, by the format's own library, and compare it with base plus product."""
    name = adapter.layout.modules[-1].name
    place, (a, b) = places[name], adapter.module(name)
    rows = min(_rows(a), len(b))
    with safe_open(folder / place.file.name, "np") as reader:
        stored = reader.get_slice(f"{name}.weight")[:rows]
    before = _open(place.file, place, "r")[:rows]
    expected = before.astype(np.float32) + b[:rows] @ a
    # A product computed twice may round a last bit differently; what was not written differs nearly everywhere.
    if np.mean(stored != expected.astype(before.dtype)) > _OTHER_BITS:
        raise ExportError(f"{name}.weight was read back from {folder} and is not what was written; check the disk")
