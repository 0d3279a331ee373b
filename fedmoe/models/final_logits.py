"""Logits of chosen positions only: the output head is a fifth of a small model's work."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

#: Settings with which a model's logits are more than its output head; unset or 0 they do nothing.
_SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_scale")


class UnsupportedModelError(ValueError):
    """A model whose computation this code would get wrong."""


def check_causal_model(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than head(last hidden state), or that would not honour a given mask."""
    config = model.config.get_text_config()
    scaled = [name for name in _SCALED if getattr(config, name, None) not in (None, 0, 0.0, 1, 1.0)]
    if scaled:
        raise UnsupportedModelError(f"{type(model).__name__} changes its logits by {', '.join(scaled)}: not supported")
    if config._attn_implementation != "sdpa":
        raise UnsupportedModelError(
            f"attention masks of trees need attn_implementation='sdpa', got {config._attn_implementation!r}"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedModelError(f"{type(model).__name__} has layers of kind {sorted(kinds)}; only full attention")


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """hidden (n, width), the decoder's last hidden states -> logits (n, vocabulary), float32."""
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    return logits.float()
