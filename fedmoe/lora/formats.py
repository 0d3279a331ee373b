"""File formats other tools read, as bytes: the PEFT folder and the npz of the specification."""

from __future__ import annotations

import io
import json

import numpy as np

from fedmoe.lora.adapter import Adapter, FloatMatrix
from fedmoe.lora.algebra import baked
from fedmoe.lora.codec import MismatchError, encode_named, read_named

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."


def peft_files(adapter: Adapter, base_model: str, revision: str | None = None) -> dict[str, bytes]:
    """The files of a PEFT adapter folder, with the whole scale baked into B and lora_alpha = r.

    Readers disagree on what to do with alpha, rsLoRA and patterns; at scale 1 and one rank they all agree.
    """
    plain = baked(adapter)
    tensors: dict[str, FloatMatrix] = {}
    for module, a, b in plain.factors():
        tensors[f"{_PEFT_PREFIX}{module.name}.lora_A.weight"] = a
        tensors[f"{_PEFT_PREFIX}{module.name}.lora_B.weight"] = b
    config = _peft_config(plain, base_model, revision)
    return {
        PEFT_CONFIG: (json.dumps(config, indent=2) + "\n").encode(),
        PEFT_WEIGHTS: encode_named(tensors, {"format": "pt"}),
    }


def _peft_config(adapter: Adapter, base_model: str, revision: str | None) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": adapter.rank,
        "lora_alpha": adapter.rank,
        "target_modules": sorted({module.name.rsplit(".", 1)[-1] for module in adapter.layout.modules}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "inference_mode": True,
    }


def read_peft(files: dict[str, bytes]) -> Adapter:
    """The adapter in the files of a PEFT folder; anything but plain LoRA at one rank and alpha is refused by name."""
    config = json.loads(files[PEFT_CONFIG])
    unsupported = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise MismatchError("not_plain_lora", f"only plain LoRA is read; this adapter uses {', '.join(unsupported)}")
    tensors = read_named(files[PEFT_WEIGHTS])
    names = {key.removeprefix(_PEFT_PREFIX).rsplit(".lora_", 1)[0] for key in tensors}
    factors = {
        name: (tensors[f"{_PEFT_PREFIX}{name}.lora_A.weight"], tensors[f"{_PEFT_PREFIX}{name}.lora_B.weight"])
        for name in names
    }
    alpha, rank = float(config["lora_alpha"]), int(config["r"])
    return Adapter.from_factors(factors, alpha * rank**0.5 if config.get("use_rslora") else alpha)


def npz_bytes(adapter: Adapter, version: int, sources: dict[str, int]) -> bytes:
    """The gateway as npz: `lora_A` (rank x sum of in-features) and `lora_B` (sum of out-features x rank), scale baked.

    Module i owns columns `in_offsets[i]:in_offsets[i+1]` of lora_A and rows `out_offsets[i]:out_offsets[i+1]` of
    lora_B; `modules` holds the names. Reads with `np.load(..., allow_pickle=False)`.
    """
    plain = baked(adapter)
    parts = list(plain.factors())
    buffer = io.BytesIO()
    np.savez(
        buffer,
        lora_A=np.concatenate([a for _, a, _ in parts], axis=1),
        lora_B=np.concatenate([b for _, _, b in parts], axis=0),
        version=np.int64(version),
        rank=np.int64(plain.rank),
        modules=np.array([module.name for module, _, _ in parts]),
        in_offsets=np.cumsum([0, *(module.in_features for module, _, _ in parts)]),
        out_offsets=np.cumsum([0, *(module.out_features for module, _, _ in parts)]),
        source_experts=np.array(sorted(sources)),
        source_versions=np.array([sources[name] for name in sorted(sources)], np.int64),
    )
    return buffer.getvalue()


def read_npz(data: bytes) -> Adapter:
    """The adapter that `npz_bytes` wrote."""
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        lora_a, lora_b = arrays["lora_A"], arrays["lora_B"]
        ins, outs = arrays["in_offsets"], arrays["out_offsets"]
        factors = {
            str(name): (lora_a[:, ins[i] : ins[i + 1]], lora_b[outs[i] : outs[i + 1]])
            for i, name in enumerate(arrays["modules"])
        }
        return Adapter.from_factors(factors, float(arrays["rank"]))
