"""What is known of a base model before it is loaded: settings, size, content hashes, by its files; without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedmoe.models.base_shape import BaseShape
from fedmoe.models.identity import BaseModelError, checkpoint_files, stored_tensors, tokenizer_hash, weights_hash
from fedmoe.models.known_bases import KNOWN_BASES, SMOLLM2_FOLDER, TINY_WEIGHTS_HASH
from fedmoe.runtime.cache import cache_root

_NEEDED = ("config.json", "tokenizer.json")


@dataclass(frozen=True, slots=True)
class StoredBase:
    """A base model by what is here of it: `config` of its text model, its folder, or None of what is not here yet."""

    name: str
    config: Mapping[str, object]
    folder: Path | None

    @property
    def shape(self) -> BaseShape | None:
        """Its sizes; None for a family that is not known by its settings alone."""
        return BaseShape.of(self.config)

    @property
    def context(self) -> int | None:
        """The tokens that its settings have room for."""
        positions = self.config.get("max_position_embeddings")
        return positions if isinstance(positions, int) else None

    def parameters(self) -> int | None:
        """Numbers in the model: counted in the headers of its files, else by its settings."""
        if self.folder is not None:
            tensors = (tensor for file in checkpoint_files(self.folder) for tensor in stored_tensors(file))
            return sum(math.prod(shape) for _, _, shape, _ in tensors)
        return self.shape.parameters if self.shape is not None else None

    def hashes(self) -> dict[str, str]:
        """The content hashes that its files have, by their names in a manifest; none of what is not here.

        Those of large files are kept, and computed again only when a file's size or time changes.
        """
        if self.name == "tiny":
            return {"weights_hash": TINY_WEIGHTS_HASH}
        if self.folder is None:
            return {}
        return {"weights_hash": weights_hash(self.folder), "tokenizer_hash": tokenizer_hash(self.folder)}


def stored_base(name: str) -> StoredBase | None:
    """What is known here of the base model `name`, as in `prepare_base`, without fetching; None if that is nothing.

    Raises BaseModelError for a folder that is incomplete.
    """
    folder = None if name == "tiny" else _folder(name)
    if folder is None:
        config = KNOWN_BASES.get(name.partition("@")[0])
        return None if config is None else StoredBase(name, config, None)
    try:
        content = json.loads((folder / "config.json").read_text("utf-8"))
        inner = content.get("text_config")
    except (ValueError, AttributeError) as error:
        raise BaseModelError(f"{folder / 'config.json'} is no JSON object ({error}); download it again") from error
    return StoredBase(name, inner if isinstance(inner, dict) else content, folder)


def _folder(name: str) -> Path | None:
    """The checkpoint folder if it is here, complete."""
    if name == "smollm2":
        root = cache_root()
        folder = root / SMOLLM2_FOLDER if root is not None else None
    else:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            folder = _in_hub_cache(name)
    if folder is None or not all((folder / file).is_file() for file in _NEEDED):
        return None  # loading says what is missing
    return folder


def _in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
        checkpoint_files(folder)
    except (LocalEntryNotFoundError, HFValidationError, OSError, ValueError, BaseModelError):
        return None  # loading fetches the rest
    return folder
