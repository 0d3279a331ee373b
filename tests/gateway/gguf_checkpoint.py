"""A Llama as a GGUF model whose weights already contain a GGUF adapter: what llama.cpp would compute with the two."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

Weights = Mapping[str, NDArray[np.float32]]


def read_adapter(path: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, object]]:
    """Tensors (rows first, as numpy has them) and metadata of a GGUF file."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


def permuted(weight: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """What llama.cpp's convert_hf_to_gguf.py does with the rows of a Llama's q_proj and k_proj."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_llama(path: Path, model: PreTrainedModel, adapter: Weights) -> None:
    """The model's weights in GGUF's order, each with its lora_b @ lora_a added."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.state_dict().items():
        weight = parameter.float().numpy()
        last = name.split(".")[-2]
        weight = permuted(weight, heads[last]) if last in heads else weight
        stored = names.get_name(name, (".weight",))
        if f"{stored}.lora_a" in adapter:
            weight = weight + adapter[f"{stored}.lora_b"] @ adapter[f"{stored}.lora_a"]
        writer.add_tensor(stored, np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
