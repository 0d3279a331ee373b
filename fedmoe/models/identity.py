"""The identity of a base model: hashes of its stored files, whatever the dtype it is loaded in."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedmoe.runtime.cache import keep_file, kept_file
from fedmoe.runtime.errors import ExpectedError

_READ = 1 << 22
_HEADER_LIMIT = 100_000_000


class BaseModelError(ExpectedError, RuntimeError):
    """A base model that is missing, incomplete or not usable."""


def hash_tensors(tensors: Iterable[tuple[str, str, list[int], Iterable[bytes]]]) -> str:
    """sha256 over tensors in name order: for each the JSON line `[name, dtype, shape]`, then its stored bytes."""
    digest = hashlib.sha256()
    for name, dtype, shape, chunks in sorted(tensors, key=lambda tensor: tensor[0]):
        digest.update(json.dumps([name, dtype, shape]).encode() + b"\n")
        for chunk in chunks:
            digest.update(chunk)
    return digest.hexdigest()


def weights_hash(folder: Path) -> str:
    """The hash of a checkpoint folder's tensors as stored; computed again only when a file's size or time changes."""
    files = checkpoint_files(folder)
    stamp = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    key = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
    cached = kept_file("hashes", f"{key}.json")
    if cached is not None:
        record = json.loads(cached.read_text("utf-8"))
        if record["files"] == stamp:
            return str(record["weights_hash"])
    digest = hash_tensors(tensor for file in files for tensor in stored_tensors(file))
    keep_file("hashes", f"{key}.json", json.dumps({"files": stamp, "weights_hash": digest}).encode())
    return digest


def canonical_tokenizer_hash(tokenizer_json: str) -> str:
    """sha256 of a tokenizer.json with sorted keys and no spaces, so that formatting does not count."""
    canonical = json.dumps(json.loads(tokenizer_json), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def tokenizer_hash(folder: Path) -> str:
    """The hash of the folder's tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BaseModelError(f"{file} is missing; a base model needs a fast tokenizer stored as tokenizer.json")
    try:
        return canonical_tokenizer_hash(file.read_text("utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{file} is not JSON ({error}); download it again") from error


def checkpoint_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in name order; raises BaseModelError naming a file that is missing."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BaseModelError(f"{index} is no index of weights ({error!r}); download it again") from error
        if not names or not all(isinstance(name, str) for name in names):
            raise BaseModelError(f"{index} names no files of weights; download it again")
    for name in names:
        if Path(name).name != name:
            raise BaseModelError(f"{index} names {name!r}, which is not a file of its own folder")
        if not (folder / name).is_file():
            raise BaseModelError(
                f"{folder / name} is missing; a base model is stored as safetensors (no pickle files), "
                "so complete the download or convert it with save_pretrained"
            )
    single = folder / "model.safetensors"
    if single.is_file() and single.name not in names:
        raise BaseModelError(
            f"{single} and {index} are two sets of weights in one folder ({index.name} names {', '.join(names[:3])}); "
            "remove one of them"
        )
    return [folder / name for name in names]


def stored_tensors(file: Path) -> list[tuple[str, str, list[int], Iterator[bytes]]]:
    """Name, dtype, shape and bytes of every tensor; the bytes are read when they are iterated over."""
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else -1
        if not 0 < length <= min(_HEADER_LIMIT, os.path.getsize(file) - 8):
            raise BaseModelError(f"{file} is not a safetensors file or is cut short; download it again")
        text = stream.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        spans = {name: [8 + length + offset for offset in entry["data_offsets"]] for name, entry in entries.items()}
        described = [(name, str(entry["dtype"]), list(entry["shape"])) for name, entry in entries.items()]
        end = max((stop for _, stop in spans.values()), default=0)
    except (ValueError, AttributeError, KeyError, TypeError):
        raise BaseModelError(f"{file} is not a safetensors file; download it again") from None
    if end > os.path.getsize(file):
        raise BaseModelError(f"{file} is cut short; download it again")
    return [(name, dtype, shape, _read_range(file, *spans[name])) for name, dtype, shape in described]


def _read_range(file: Path, start: int, stop: int) -> Iterator[bytes]:
    with file.open("rb") as stream:
        stream.seek(start)
        while start < stop:
            chunk = stream.read(min(_READ, stop - start))
            if not chunk:
                raise BaseModelError(f"{file} became shorter while it was read")
            start += len(chunk)
            yield chunk
