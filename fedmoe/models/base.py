"""Loading the frozen base model, and saying exactly which one it is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from fedmoe.cache import can_be_written, temporary_root
from fedmoe.manifest import BaseModel
from fedmoe.models.cache import make_once
from fedmoe.models.device import choose_device, choose_dtype
from fedmoe.models.identity import BaseModelError, checkpoint_files, tokenizer_hash, weights_hash
from fedmoe.models.smollm2 import REVISION as SMOLLM2_REVISION
from fedmoe.models.smollm2 import prepare_smollm2
from fedmoe.models.tiny import save_tiny, tiny_hashes, tiny_model, tiny_tokenizer

__all__ = ["BaseModelError", "LoadedBase", "load_base", "prepare_base"]

_TINY_REVISION = "1"
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w.-]+)?$")
_HUB_FILES = ["*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*"]
_HUB_FILES += ["special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja", "added_tokens.json"]


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model on its device, its tokenizer, its identity, and a `report` of how it was loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: BaseModel
    device: torch.device
    dtype: torch.dtype
    report: Mapping[str, str]


def prepare_base(name: str) -> Path:
    """The checkpoint folder of a base model, fetched or made if need be, without loading it.

    `name` is `smollm2` (embedded default), `tiny` (random, for tests), a folder, or a hub id `owner/model[@revision]`.
    Raises BaseModelError saying which file is missing and what to do offline.
    """
    return _locate(name)[0]


def load_base(name: str, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto") -> LoadedBase:
    """Load a base model (names as in `prepare_base`) frozen, in evaluation mode, on one device.

    Its identity is that of the stored checkpoint and does not depend on device or dtype.
    """
    chosen_device = choose_device(device) if isinstance(device, str) else device
    chosen_dtype = choose_dtype(dtype, chosen_device) if isinstance(dtype, str) else dtype
    if name == "tiny":
        model, tokenizer = tiny_model(), tiny_tokenizer()
        identity = BaseModel("tiny", _TINY_REVISION, *tiny_hashes(model, tokenizer))
        model = model.to(chosen_dtype)
    else:
        folder, revision = _locate(name)
        # The identity travels to the coordinator: a local folder's path is nobody else's business.
        shown = folder.resolve().name if revision == "local" else name.partition("@")[0]
        identity = BaseModel(shown, revision, weights_hash(folder), tokenizer_hash(folder))
        model, tokenizer = _load_folder(folder, chosen_dtype)
    model = model.to(chosen_device).requires_grad_(False).eval()
    return LoadedBase(
        model, tokenizer, identity, chosen_device, chosen_dtype, _report(identity, chosen_device, chosen_dtype)
    )


def _report(identity: BaseModel, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    return {
        "base": identity.name,
        "revision": identity.revision,
        "weights_hash": identity.weights_hash,
        "tokenizer_hash": identity.tokenizer_hash,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
    }


def _locate(name: str) -> tuple[Path, str]:
    if name == "smollm2":
        return prepare_smollm2(), SMOLLM2_REVISION
    if name == "tiny":
        return make_once(f"tiny-{_TINY_REVISION}", save_tiny), _TINY_REVISION
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder), "local"
    if folder.is_absolute() or name.startswith((".", "~")) or not _HUB_NAME.match(name):
        raise BaseModelError(f"base model folder {name} does not exist; use a folder, a hub id, smollm2 or tiny")
    return _from_hub(name)


def _download(repository: str, revision: str | None, offline: bool) -> str:
    """The folder of a hub model, downloaded if need be; a cache that can only be read is read."""

    def fetch(cache: Path, from_cache: bool) -> str:
        return snapshot_download(
            repository, revision=revision, allow_patterns=_HUB_FILES, cache_dir=cache, local_files_only=from_cache
        )

    hub = Path(HF_HUB_CACHE)
    if offline or can_be_written(hub, "HF_HOME"):
        return fetch(hub, offline)
    try:
        return fetch(hub, True)
    except LocalEntryNotFoundError:
        return fetch(temporary_root() / "hub", False)


def _from_hub(name: str) -> tuple[Path, str]:
    repository, _, revision = name.partition("@")
    offline = _is_offline()
    try:
        found = _download(repository, revision or None, offline)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        why = "HF_HUB_OFFLINE is set and it is not in the hub cache" if offline else f"{type(error).__name__}: {error}"
        raise BaseModelError(
            f"base model {name} cannot be had from the hub: {why}\nOffline: copy its folder (config.json, "
            "model.safetensors, tokenizer.json) here and name the folder, or use the embedded model smollm2."
        ) from error
    folder = Path(found)
    return _checked(folder), folder.name


def _is_offline() -> bool:
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def _checked(folder: Path) -> Path:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise BaseModelError(f"{folder / name} is missing; the base model's folder or download is incomplete")
    checkpoint_files(folder)
    return folder


def _load_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    disable_progress_bar()  # a bar in a log file is noise, and loading takes a second
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise BaseModelError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    return model, tokenizer
