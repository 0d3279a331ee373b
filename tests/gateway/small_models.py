"""Small random models as checkpoint folders, adapters for them, and what a model computes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from fedmoe.gateway.export import ExpertVersion, ExportSource
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.manifest import BaseModel
from fedmoe.models.identity import weights_hash
from fedmoe.models.lora_layers import ALL_LINEAR, attach, find_targets

TOKENS = torch.arange(3, 43).reshape(1, -1)


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, shard: str = "5GB") -> Path:
    """A Llama of 2 layers with 4 query heads, 2 key heads and an output head of its own."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.15)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def layout_of(model: PreTrainedModel, targets: str = ALL_LINEAR, rank: int = 3) -> Layout:
    shapes = [ModuleShape(n, layer.in_features, layer.out_features) for n, layer in find_targets(model, targets)]
    return Layout(tuple(shapes), rank)


def exportable(folder: Path, adapter: Adapter, name: str = "gateway") -> ExportSource:
    base = BaseModel("small/base", "r1", weights_hash(folder), "b" * 64)
    return ExportSource(name, 7, adapter, {"python": ExpertVersion(3, "c" * 64), "sql": ExpertVersion(4, None)}, base)


def other_base(source: ExportSource) -> ExportSource:
    return replace(source, base=replace(source.base, weights_hash="0" * 64))


def logits(model: PreTrainedModel, adapter: Adapter | None = None) -> NDArray[np.float32]:
    """float32 (positions, vocabulary), with the adapter applied by our own layers."""
    if adapter is not None:
        targets = [module.name for module in adapter.layout.modules]
        attached = attach(model, targets, adapter.rank, adapter.alpha)
        attached.load(adapter)
    with torch.inference_mode():
        computed = model(TOKENS).logits[0].float().numpy()
    if adapter is not None:
        attached.detach()
    return np.asarray(computed, np.float32)
