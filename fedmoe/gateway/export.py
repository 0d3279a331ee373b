"""Exports a gateway or an expert as PEFT or npz, with a manifest of what it was made of."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmoe import __version__
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.codec import digest
from fedmoe.lora.formats import npz_bytes, peft_files
from fedmoe.lora.manifest import BaseModel
from fedmoe.runtime.files import write_atomic, write_folder_atomic

#: The manifest inside a folder; that of a single file has this behind the file's name.
MANIFEST_NAME = "fedmoe_export.json"


class ExportError(RuntimeError):
    """A model that cannot be written in a format, or not onto this base model; nothing was written."""


@dataclass(frozen=True, slots=True)
class ExpertVersion:
    """One expert that a model is made of; the digest is None where that version's is not known any more."""

    version: int
    digest: str | None


@dataclass(frozen=True)
class ExportSource:
    """A model to export: its name, its version, the adapter, what that is made of, and the base model it belongs on."""

    name: str
    version: int
    adapter: Adapter
    sources: Mapping[str, ExpertVersion]
    base: BaseModel

    def manifest(
        self, format: str, files: Mapping[str, str], libraries: Sequence[str], **facts: float | int | str
    ) -> bytes:
        """The manifest as JSON: sources and hashes, base model, format, sha256 of every file, library versions."""
        content = {
            "format": format,
            "model": self.name,
            "version": self.version,
            "digest": digest(self.adapter),
            "rank": self.adapter.rank,
            "sources": {name: asdict(self.sources[name]) for name in sorted(self.sources)},
            "base": asdict(self.base),
            **facts,
            "files": dict(sorted(files.items())),
            "libraries": {"fedmoe": __version__, **{name: importlib.metadata.version(name) for name in libraries}},
        }
        return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def export_peft(source: ExportSource, target: Path, force: bool = False, base_folder: Path | None = None) -> None:
    """A PEFT adapter folder, which transformers, vLLM and llama.cpp's converter read too; scale baked into B.

    Readers load the base model that it names: `base_folder`, or else the federation's name for it.
    """
    # `local` is no revision that a hub knows: a reader who asked for it would get nothing.
    revision = source.base.revision if source.base.revision not in ("", "local") else None
    named = (source.base.name, revision) if base_folder is None else (str(base_folder.resolve()), None)
    files = peft_files(source.adapter, *named)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    manifest = source.manifest("peft", hashes, ("numpy",))
    write_folder_atomic(target, {**files, MANIFEST_NAME: manifest}, force)


def export_npz(source: ExportSource, target: Path, force: bool = False) -> None:
    """One npz file of arrays, as `fedmoe.lora.formats.npz_bytes` lays them out."""
    versions = {name: part.version for name, part in source.sources.items()}
    export_file(source, "npz", npz_bytes(source.adapter, source.version, versions), ("numpy",), target, force)


def export_file(
    source: ExportSource, format: str, data: bytes, libraries: Sequence[str], target: Path, force: bool
) -> None:
    """Write one file, then the manifest beside it, which names the file's sha256."""
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; choose another place or pass --force to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, data, 0o644)
    manifest = source.manifest(format, {target.name: hashlib.sha256(data).hexdigest()}, libraries)
    write_atomic(target.with_name(f"{target.name}.{MANIFEST_NAME}"), manifest, 0o644)


def check_base(trained: str, base: BaseModel, shown: str, weights_hash: str) -> None:
    """Refuse the base model `shown` where its weights are not those that `trained` ("docs was") was trained on."""
    if weights_hash != base.weights_hash:
        raise ExportError(
            f"{trained} trained on {base.name} (weights {base.weights_hash[:12]}), but {shown} has weights "
            f"{weights_hash[:12]}; name the federation's base model with --base-model"
        )


def read_config(folder: Path) -> dict[str, object]:
    """The config.json of a checkpoint folder; raises ExportError if it is not a JSON object."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder / 'config.json'} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ExportError(f"{folder / 'config.json'} must hold a JSON object, got {type(config).__name__}")
    return config


def check_untied(source: ExportSource, config: Mapping[str, object]) -> None:
    """Refuse an adapted output head that shares its weights with the embedding: changing it would change both."""
    heads = [module.name for module in source.adapter.layout.modules if module.name.rpartition(".")[2] == "lm_head"]
    if heads and config.get("tie_word_embeddings"):
        raise ExportError(
            f"{source.name} adapts {heads[0]}, which is tied to the embedding of {source.base.name}; export it as peft"
        )


def file_hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder, by name."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
