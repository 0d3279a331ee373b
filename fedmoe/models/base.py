"""Loads a frozen base model with its tokenizer, and identifies it by the hashes of its stored files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from fedmoe.lora.manifest import BaseModel
from fedmoe.models.base_check import (
    LoadedWeights,
    check_loaded,
    check_settings,
    refuse,
    stored_template_findings,
    template_findings,
)
from fedmoe.models.chat_template import ChatTemplate, template_hash
from fedmoe.models.identity import BaseModelError, checkpoint_files, tokenizer_hash, weights_hash
from fedmoe.models.known_bases import SMOLLM2_REVISION, TINY_REVISION
from fedmoe.models.smollm2 import prepare_smollm2
from fedmoe.models.stop_tokens import context_of, stop_token_ids
from fedmoe.models.tiny import save_tiny, tiny_hashes, tiny_model, tiny_tokenizer
from fedmoe.runtime.cache import build_once, can_be_written, temporary_root
from fedmoe.runtime.device import choose_device, choose_dtype

__all__ = [
    "BaseModelError",
    "ChatTemplate",
    "LoadedBase",
    "context_length",
    "load_base",
    "load_tokenizer",
    "pad_token",
    "prepare_base",
    "stop_tokens",
]

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(@[\w.-]+)?$")
_HUB_FILES = ["*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*"]
_HUB_FILES += ["special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja", "added_tokens.json"]


@dataclass(frozen=True)
class LoadedBase:
    """A frozen base model on its device, its tokenizer and identity, a `report` of how it was loaded, and warnings."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: BaseModel
    device: torch.device
    dtype: torch.dtype
    report: Mapping[str, str]
    notes: tuple[str, ...] = ()


def stop_tokens(base: LoadedBase) -> frozenset[int]:
    """The tokens that end an answer wherever one is generated: see `stop_token_ids`."""
    return stop_token_ids(base.tokenizer, base.model.generation_config)


def pad_token(base: LoadedBase) -> int:
    """The token that pads rows; nothing attends to it, so without one of its own a token that ends answers will do."""
    named = base.tokenizer.pad_token_id
    return int(named) if named is not None else min(stop_tokens(base))


def context_length(base: LoadedBase) -> int:
    """How many tokens the model has room for: see `context_of`."""
    return context_of(base.model.config, base.tokenizer)[0]


def prepare_base(name: str) -> Path:
    """The checkpoint folder of a base model, fetched or made if need be, without loading it.

    `name` is `smollm2` (embedded default), `tiny` (random, for tests), a folder, or a hub id `owner/model[@revision]`.
    Raises BaseModelError saying which file is missing and what to do offline.
    """
    return _locate(name)[0]


def load_base(
    name: str,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    chat: ChatTemplate | None = None,
) -> LoadedBase:
    """Load a base model (names as in `prepare_base`) frozen, in evaluation mode, on one device.

    Its identity is that of the stored checkpoint and does not depend on device, dtype or `chat`. Raises BaseModelError
    where its parts do not fit together, see `base_check`.
    """
    chosen_device = choose_device(device) if isinstance(device, str) else device
    chosen_dtype = choose_dtype(dtype, chosen_device) if isinstance(dtype, str) else dtype
    chat = chat or ChatTemplate()
    if name == "tiny":
        model, tokenizer = tiny_model(), tiny_tokenizer()
        identity = BaseModel("tiny", TINY_REVISION, *tiny_hashes(model, tokenizer))
        chat.apply(tokenizer, name)
        notes = check_loaded(name, model, tokenizer, LoadedWeights())
        model = model.to(chosen_dtype)
    else:
        folder, revision = _locate(name)
        # The identity travels to the coordinator: a local folder's path is nobody else's business.
        shown = folder.resolve().name if revision == "local" else name.partition("@")[0]
        check_settings(folder)
        identity = BaseModel(shown, revision, weights_hash(folder), tokenizer_hash(folder))
        model, tokenizer, notes = _load_folder(folder, chosen_dtype, chat)
    model = model.to(chosen_device).requires_grad_(False).eval()
    base = LoadedBase(model, tokenizer, identity, chosen_device, chosen_dtype, {}, notes)
    return replace(base, report=_report(base, chat))


def load_tokenizer(name: str, chat: ChatTemplate | None = None) -> tuple[PreTrainedTokenizerBase, int]:
    """A base model's tokenizer with its chat template, and its context in tokens; the weights are not loaded.

    Names and errors as in `load_base`, as far as tokenizer and template go.
    """
    chat = chat or ChatTemplate()
    if name == "tiny":
        tokenizer, config = tiny_tokenizer(), tiny_model().config
    else:
        folder, _ = _locate(name, weights=False)
        check_settings(folder)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # the libraries raise whatever a file makes them stumble over
            raise BaseModelError(f"the tokenizer of {folder} cannot be loaded: {error}") from error
    chat.apply(tokenizer, name)
    refuse(template_findings(name, tokenizer)[0])
    return tokenizer, context_of(config, tokenizer)[0]


def _report(base: LoadedBase, chat: ChatTemplate) -> dict[str, str]:
    identity, tokenizer = base.identity, base.tokenizer
    length, source = context_of(base.model.config, tokenizer)
    template = template_hash(tokenizer)
    return {
        "base": identity.name,
        "revision": identity.revision,
        "weights_hash": identity.weights_hash,
        "tokenizer_hash": identity.tokenizer_hash,
        "chat_template_hash": template if chat == ChatTemplate() else f"{template} (not the model's own)",
        "stop_tokens": ", ".join(repr(tokenizer.decode([token])) for token in sorted(stop_tokens(base))),
        "context": f"{length} ({source})",
        "device": str(base.device),
        "dtype": str(base.dtype).removeprefix("torch."),
        "threads": str(torch.get_num_threads()),
    }


def _locate(name: str, weights: bool = True) -> tuple[Path, str]:
    if name == "smollm2":
        return prepare_smollm2(), SMOLLM2_REVISION
    if name == "tiny":
        return build_once(f"tiny-{TINY_REVISION}", save_tiny), TINY_REVISION
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _checked(folder, weights), "local"
    if folder.is_absolute() or name.startswith((".", "~")) or not _HUB_NAME.match(name):
        raise BaseModelError(f"base model folder {name} does not exist; use a folder, a hub id, smollm2 or tiny")
    return _from_hub(name, weights)


def _download(repository: str, revision: str | None, offline: bool, weights: bool) -> str:
    """The folder of a hub model, downloaded if need be; a cache that is read-only is used as it is."""
    files = [file for file in _HUB_FILES if weights or not file.endswith(".safetensors")]

    def fetch(cache: Path, from_cache: bool) -> str:
        return snapshot_download(
            repository, revision=revision, allow_patterns=files, cache_dir=cache, local_files_only=from_cache
        )

    hub = Path(HF_HUB_CACHE)
    if offline or can_be_written(hub, "HF_HOME"):
        return fetch(hub, offline)
    try:
        return fetch(hub, True)
    except LocalEntryNotFoundError:
        return fetch(temporary_root() / "hub", False)


def _from_hub(name: str, weights: bool) -> tuple[Path, str]:
    repository, _, revision = name.partition("@")
    settings = (os.environ.get(variable, "").upper() for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    offline = any(setting in ("1", "ON", "YES", "TRUE") for setting in settings)
    try:
        folder = Path(_download(repository, revision or None, offline, weights))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        why = "HF_HUB_OFFLINE is set and it is not in the hub cache" if offline else f"{type(error).__name__}: {error}"
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403, 404):
            why = f"it answered {error.response.status_code}: check the name, and HF_TOKEN where it is private or gated"
        raise BaseModelError(
            f"base model {name} cannot be had from the hub: {why}\nOffline: copy its folder (config.json, "
            "model.safetensors, tokenizer.json) here and name the folder, or use the embedded model smollm2."
        ) from error
    return _checked(folder, weights), folder.name


def _checked(folder: Path, weights: bool) -> Path:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise BaseModelError(f"{folder / name} is missing; the base model's folder or download is incomplete")
    if weights:
        checkpoint_files(folder)
    return folder


def _load_folder(
    folder: Path, dtype: torch.dtype, chat: ChatTemplate
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, tuple[str, ...]]:
    disable_progress_bar()  # a bar in a log file is noise, and loading takes a second
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            attn_implementation="sdpa",
            # What is missing or of another shape is reported by us, with both values.
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # the libraries raise whatever a file makes them stumble over
        raise BaseModelError(f"{folder} cannot be loaded as a causal language model: {error}") from error
    mismatched = [(name, tuple(stored), tuple(expected)) for name, stored, expected in loading["mismatched_keys"]]
    weights = LoadedWeights(loading["missing_keys"], loading["unexpected_keys"], mismatched)
    problems, notes = stored_template_findings(folder, tokenizer) if chat.text is None else ([], [])
    refuse(problems)
    chat.apply(tokenizer, str(folder))
    return model, tokenizer, (*notes, *check_loaded(str(folder), model, tokenizer, weights))
