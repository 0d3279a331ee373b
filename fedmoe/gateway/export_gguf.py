"""Exports an adapter as a GGUF LoRA file, which llama.cpp reads beside the GGUF of the base model.

Follows llama.cpp's convert_lora_to_gguf.py: tensors `<tensor>.lora_a` (r x in) and `<tensor>.lora_b` (out x r), and
`adapter.lora.alpha`, which is the rank here, so that the scale is 1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from fedmoe.gateway.export import ExportError, ExportSource, check_base, check_untied, export_file, read_config
from fedmoe.lora.adapter import FloatMatrix
from fedmoe.lora.algebra import baked
from fedmoe.models.identity import weights_hash

#: Class in config.json -> architecture in GGUF, and whether its query and key rows are stored in llama.cpp's rotary
#: order; as in llama.cpp's convert_hf_to_gguf.py.
_ARCHITECTURES = {
    "LlamaForCausalLM": (gguf.MODEL_ARCH.LLAMA, True),
    "MistralForCausalLM": (gguf.MODEL_ARCH.LLAMA, True),
    "Qwen2ForCausalLM": (gguf.MODEL_ARCH.QWEN2, False),
    "Qwen3ForCausalLM": (gguf.MODEL_ARCH.QWEN3, False),
}


def export_gguf_lora(source: ExportSource, base_folder: Path, target: Path, force: bool = False) -> None:
    """Write the adapter as one float32 GGUF file; of the base model only config.json is used.

    Raises ExportError for another base model, an architecture that is not in the table, or a module without a place.
    """
    check_base(f"{source.name} was", source.base, str(base_folder), weights_hash(base_folder))
    data = gguf_lora_bytes(source, read_config(base_folder))
    export_file(source, "gguf-lora", data, ("numpy", "gguf"), target, force)


def gguf_lora_bytes(source: ExportSource, config: Mapping[str, object]) -> bytes:
    """The GGUF file of an adapter on a base model with this config.json."""
    classes = config.get("architectures")
    name = str(classes[0]) if isinstance(classes, list) and classes else "none"
    if name not in _ARCHITECTURES:
        raise ExportError(
            f"gguf-lora knows {', '.join(_ARCHITECTURES)}; config.json names {name}. Export it as peft and use "
            "llama.cpp's convert_lora_to_gguf.py"
        )
    architecture, interleaved = _ARCHITECTURES[name]
    check_untied(source, config)
    names = gguf.get_tensor_name_map(architecture, _count(config, "num_hidden_layers"))
    adapter = baked(source.adapter)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "adapter.gguf"
        writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, adapter.alpha)
        writer.add_name(source.name)
        writer.add_version(str(source.version))
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, source.base.name)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        for module, a, b in adapter.factors():
            name = names.get_name(f"{module.name}.weight", (".weight",))
            if name is None:
                raise ExportError(
                    f"{module.name} has no place in the GGUF architecture {writer.arch}; export it as peft"
                )
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a))
            rows = _interleaved(b, _heads(config, module.name)) if interleaved else b
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(rows))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def _count(config: Mapping[str, object], key: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ExportError(f"config.json needs a positive number as {key}, got {value!r}")
    return value


def _heads(config: Mapping[str, object], module: str) -> int | None:
    """How many rotary heads the module's rows belong to; None for a module without."""
    last = module.rpartition(".")[2]
    if last == "q_proj" or (last == "k_proj" and config.get("num_key_value_heads") is None):
        return _count(config, "num_attention_heads")
    return _count(config, "num_key_value_heads") if last == "k_proj" else None


def _interleaved(b: FloatMatrix, heads: int | None) -> FloatMatrix:
    """B's rows in the order of the base GGUF: within a head, the two halves that rotary embeddings pair alternate.

    transformers pairs dimension i with i + d/2, llama.cpp's `llama` architecture 2i with 2i + 1.
    """
    if heads is None:
        return b
    if b.shape[0] % (2 * heads):
        raise ExportError(f"{b.shape[0]} rows cannot be split into {heads} heads of an even size")
    return b.reshape(heads, 2, -1, b.shape[1]).swapaxes(1, 2).reshape(b.shape)
