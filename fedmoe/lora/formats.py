"""File formats that other tools read, as bytes: the PEFT folder and the npz of the specification."""

from __future__ import annotations

import io
import json
import math
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import IO

import numpy as np
from numpy.lib import format as npy

from fedmoe.lora.adapter import Adapter, FloatMatrix
from fedmoe.lora.algebra import baked
from fedmoe.lora.safetensors_bytes import CodecError, MalformedError, MismatchError, encode_named, read_named, shown

PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
_PEFT_PREFIX = "base_model.model."
_PEFT_KEY = re.compile(re.escape(_PEFT_PREFIX) + r"(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<factor>[AB])\.weight")
# Options of PEFT 0.21's LoraConfig that change what the two factors mean, or add weights beside them.
_NOT_PLAIN = (
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
# Starts that also change the base weights: the saved factors belong to that other base.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


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


def read_peft(files: Mapping[str, bytes]) -> Adapter:
    """The adapter in the files of a PEFT folder, by file name; rsLoRA's scale is turned into the alpha that gives it.

    Anything but plain LoRA at one rank and alpha is refused: `MismatchError` names the option or tensor in the way,
    `MalformedError` a file that is missing or cannot be read.
    """
    config = _read_config(files)
    rank = _positive(config, "r")
    alpha = _positive(config, "lora_alpha")
    adapter = Adapter.from_factors(_peft_factors(read_named(_file(files, PEFT_WEIGHTS))), 1.0)
    if adapter.rank != rank:
        raise MismatchError("rank_mismatch", f"{PEFT_CONFIG} says r = {rank:g}, the tensors have rank {adapter.rank}")
    return Adapter(adapter.layout, alpha * rank**0.5 if config.get("use_rslora") else alpha, adapter.flat)


def _file(files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise MalformedError(f"a PEFT adapter needs {name}; got {shown(sorted(files)) or 'no file'}")
    return files[name]


def _read_config(files: Mapping[str, bytes]) -> dict[str, object]:
    try:
        config = json.loads(_file(files, PEFT_CONFIG))
    except CodecError:
        raise
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{PEFT_CONFIG} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise MalformedError(f"{PEFT_CONFIG} must be a JSON object, got {type(config).__name__}")
    unsupported = [key for key in _NOT_PLAIN if config.get(key)]
    if config.get("peft_type", "LORA") != "LORA":
        unsupported.append("peft_type")
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if str(config.get("init_lora_weights", True)).startswith(_CHANGES_BASE):
        unsupported.append("init_lora_weights")
    if unsupported:
        raise MismatchError("not_plain_lora", f"only plain LoRA is read; this adapter uses {', '.join(unsupported)}")
    return config


def _positive(config: Mapping[str, object], key: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 32:
        raise MalformedError(f"{PEFT_CONFIG} needs a positive number as {key}")
    return float(value)


def _peft_factors(tensors: Mapping[str, FloatMatrix]) -> dict[str, tuple[FloatMatrix, FloatMatrix]]:
    pairs: dict[str, dict[str, FloatMatrix]] = {}
    for key, values in tensors.items():
        match = _PEFT_KEY.fullmatch(key)
        if match is None or values.ndim != 2 or 0 in values.shape:
            raise MismatchError("not_plain_lora", f"{shown([key])} of shape {values.shape} is no factor of plain LoRA")
        pairs.setdefault(match["module"], {})[match["factor"]] = values
    halves = sorted(name for name, pair in pairs.items() if len(pair) != 2)
    if halves or not pairs:
        raise MismatchError("tensor_mismatch", f"every module needs lora_A and lora_B: {shown(halves) or 'no module'}")
    factors = {name: (pair["A"], pair["B"]) for name, pair in pairs.items()}
    ranks = {a.shape[0] for a, _ in factors.values()} | {b.shape[1] for _, b in factors.values()}
    if len(ranks) != 1:
        raise MismatchError("rank_mismatch", f"all factors must share one rank, got {sorted(ranks)[:5]}")
    return factors


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
        source_experts=np.array(sorted(sources), np.str_),
        source_versions=np.array([sources[name] for name in sorted(sources)], np.int64),
    )
    return buffer.getvalue()


def read_npz(data: bytes) -> Adapter:
    """The adapter that `npz_bytes` wrote; raises `MalformedError` for anything else."""
    try:
        _check_members(data)
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            lora_a, lora_b = arrays["lora_A"], arrays["lora_B"]
            ins, outs = arrays["in_offsets"], arrays["out_offsets"]
            factors = {
                str(name): (lora_a[:, ins[i] : ins[i + 1]], lora_b[outs[i] : outs[i + 1]])
                for i, name in enumerate(arrays["modules"])
            }
            return Adapter.from_factors(factors, float(arrays["rank"]))
    except _NO_NPZ as error:
        raise MalformedError(f"not a gateway as npz: {error}") from None


# What zipfile and numpy raise for bytes that are none: also encrypted members and sizes beyond the machine's.
_NO_NPZ = (
    *(ValueError, LookupError, TypeError, AttributeError, EOFError, RuntimeError, OverflowError),
    *(struct.error, zipfile.BadZipFile),
)


def _check_members(data: bytes) -> None:
    """Raise `ValueError` for an archive that would be more than its bytes: packed, or an array that lies about itself.

    `np.load` allocates what an array's header says before it has read a byte of it.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        for member in members:
            if member.compress_type != zipfile.ZIP_STORED or member.file_size != member.compress_size:
                raise ValueError(f"{shown([member.filename])} is compressed; arrays lie in it as they are")
        if sum(member.file_size for member in members) > len(data):
            raise ValueError("its members overlap")
        for member in members:
            with archive.open(member) as file:
                _check_array(member, file)


def _check_array(member: zipfile.ZipInfo, file: IO[bytes]) -> None:
    header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(file))
    if header is None:
        raise ValueError(f"{shown([member.filename])} is of an unknown version of npy")
    shape, _, dtype = header(file)
    if file.tell() + math.prod(shape) * dtype.itemsize != member.file_size:
        raise ValueError(f"{shown([member.filename])} says it has shape {shape}, and has {member.file_size} bytes")
