"""Terms of a federation: base model, LoRA and row length are taken from it unless set; a difference is refused.

No torch here: what is refused is refused before it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedmoe.config import WorkerConfig
from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.manifest import BaseModel, Manifest, base_differences
from fedmoe.models.base_shape import ALL_LINEAR, selected
from fedmoe.models.stored_base import StoredBase
from fedmoe.wire.contract.messages import FederationInfo
from fedmoe.worker.options import OptionError


def with_base(config: WorkerConfig, theirs: Manifest | None) -> WorkerConfig:
    """The configuration with the federation's base model unless one is set; raises OptionError if only they have it."""
    if theirs is None or "base_model" in config.model_fields_set:
        return config
    return config.model_copy(update={"base_model": place_of(theirs.base)})


def place_of(base: BaseModel) -> str:
    """Where a federation's base model can be had, as --base-model takes it; raises OptionError for another's folder."""
    if base.revision == "local":
        raise OptionError(
            f"the federation's base model is a folder called {base.name} on another machine (weights "
            f"{base.weights_hash[:12]}); give its place here with --base-model FOLDER"
        )
    return base.name if base.name in ("tiny", "smollm2") else f"{base.name}@{base.revision}"


def settled(
    config: WorkerConfig, info: FederationInfo, theirs: Manifest | None, base: StoredBase | None
) -> WorkerConfig:
    """The configuration with the federation's LoRA values and row length in the place of those that are not set.

    `theirs` is the federation's manifest, None before its first expert: then the configuration's defaults hold. `base`
    is what is known of the base model. Raises OptionError, with all differences, for values that are set otherwise.
    """
    modules = base.shape.modules if base is not None and base.shape is not None else None
    values: dict[str, object] = {}
    if theirs is not None:
        values |= {"lora_r": theirs.layout.rank, "lora_alpha": theirs.alpha}
        values["target_modules"] = targets_of(theirs.layout, modules)
    if info.max_length is not None:
        values["max_length"] = info.max_length
    unset = {name: value for name, value in values.items() if name not in config.model_fields_set}
    config = config.model_copy(update=unset)
    differences = _base_differences(theirs.base, base) if theirs is not None and base is not None else {}
    differences |= _lora_differences(config, theirs, modules) if theirs is not None else {}
    if info.max_length is not None and config.max_length != info.max_length:
        differences["max_length"] = [f"max_length: expected {info.max_length}, got {config.max_length}"]
    if differences:
        raise OptionError(_refusal(differences))
    return config


def _refusal(differences: Mapping[str, Sequence[str]]) -> str:
    texts = [text for named in differences.values() for text in named]
    advice = []
    if flags := ", ".join(f"--{name.replace('_', '-')}" for name in differences if name != "base_model"):
        advice.append(f"leave out {flags} (the flag, its environment variable, its line in the file)")
    if "base_model" in differences:
        advice.append("give --base-model as the federation's first worker did")
    return f"all experts share one LoRA configuration; {'; '.join(texts[:5])}. To join, {' and '.join(advice)}"


def _base_differences(theirs: BaseModel, base: StoredBase) -> dict[str, list[str]]:
    both = {"weights_hash": theirs.weights_hash, "tokenizer_hash": theirs.tokenizer_hash}
    texts = base_differences(theirs, BaseModel(base.name, "", **both | base.hashes()))
    return {"base_model": texts} if texts else {}


def _lora_differences(
    config: WorkerConfig, theirs: Manifest, modules: Sequence[ModuleShape] | None
) -> dict[str, list[str]]:
    differences = {}
    if config.lora_r != theirs.layout.rank:
        differences["lora_r"] = [f"rank: expected {theirs.layout.rank}, got {config.lora_r}"]
    if config.lora_alpha != theirs.alpha:
        differences["lora_alpha"] = [f"lora_alpha: expected {theirs.alpha:g}, got {config.lora_alpha:g}"]
    names = [module.name for module in theirs.layout.modules]
    # Without the base model's own names only what is missing is known; the rest is looked at once it is loaded.
    chosen = selected([module.name for module in modules] if modules is not None else names, config.target_modules)
    texts = [f"module missing: {name}" for name in sorted({*names} - {*chosen})]
    texts += [f"module not expected: {name}" for name in sorted({*chosen} - {*names})]
    return differences | ({"target_modules": texts} if texts else {})


def targets_of(layout: Layout, modules: Sequence[ModuleShape] | None) -> tuple[str, ...]:
    """--target-modules for the modules of `layout`: the shortest that choose these of the base model's `modules`.

    Their full names where the base model's modules are not known.
    """
    names = [module.name for module in layout.modules]
    if modules is None:
        return tuple(names)
    ours = [module.name for module in modules]
    ends = tuple(sorted({name.rpartition(".")[2] for name in names}))
    return next((t for t in ((ALL_LINEAR,), ends) if {*selected(ours, t)} == {*names}), tuple(names))
