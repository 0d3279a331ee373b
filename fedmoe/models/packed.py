"""Token losses of packed batches, in which several samples share a row and none attends to another."""

from __future__ import annotations

import inspect
from dataclasses import fields

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from fedmoe.datasets.tokens.packing import Batch
from fedmoe.datasets.tokens.tokenized_sample import MASKED
from fedmoe.models.final_logits import has_plain_head, selected_logprobs


def attention_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """segment_ids (batch, length) -> bool (batch, 1, length, length), True where a token may look.

    Causal inside a segment. Padding (-1) looks at padding, so that no row is empty: an empty row would give NaN.
    """
    same = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return same & causal


def count_targets(batch: Batch) -> int:
    """How many tokens of the batch are predicted and labelled."""
    labels, segments = batch.labels, batch.segment_ids
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
    return int(np.count_nonzero((labels[:, 1:] != MASKED) & inside))


def without_padding(batch: Batch) -> Batch:
    """The batch without the columns at its end that no row uses; nothing looks there."""
    used = np.flatnonzero((batch.segment_ids >= 0).any(axis=0))
    width = int(used[-1]) + 1 if used.size else 0
    return Batch(*(getattr(batch, field.name)[:, :width] for field in fields(Batch)))


def token_losses(model: PreTrainedModel, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every labelled token in nats, float32 (n,), and the row of the batch each belongs to, int64 (n,).

    A token is predicted by the one before it in the same segment; the first of a sample is never a target.
    """
    inputs, labels, positions, segments = (
        torch.from_numpy(array).to(device)
        for array in (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids)
    )
    inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] >= 0)
    targets = (labels[:, 1:] != MASKED) & inside
    mask = attention_mask(segments)
    if has_plain_head(model) and count_targets(batch) and not torch.is_autocast_enabled(device.type):
        # The head for labelled tokens alone, some at a time: all their logits would be larger than all the rest.
        decoder = model.get_decoder()
        hidden = decoder(input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=False)
        tokens = labels[:, 1:][targets].cpu().numpy()
        logprobs, _ = selected_logprobs(
            model, hidden.last_hidden_state[:, :-1][targets], np.arange(len(tokens)), tokens
        )
        return -logprobs, targets.nonzero()[:, 0]
    # The output head is a fifth of a small model's work: run it only on columns in which some row has a target.
    columns = targets.any(dim=0).nonzero().flatten()
    logits = model(
        input_ids=inputs,
        attention_mask=mask,
        position_ids=positions,
        use_cache=False,
        logits_to_keep=columns,
    ).logits
    chosen = targets[:, columns]
    losses = functional.cross_entropy(logits[chosen].float(), labels[:, 1:][:, columns][chosen], reduction="none")
    return losses, chosen.nonzero()[:, 0]


def check_model(model: PreTrainedModel) -> None:
    """Refuse a model that would not honour the block-diagonal mask or the selection of columns."""
    attention = model.config._attn_implementation
    if attention != "sdpa":
        raise ValueError(f"packed training needs attn_implementation='sdpa', this model was loaded with {attention!r}")
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__}.forward has no logits_to_keep; this architecture is not supported")


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Keep only each layer's input and compute the rest again in the backward pass; acts in training mode."""
    # The older name, of transformers before 5.20, warns where the newer one exists. Non-reentrant: a frozen embedding's
    # output needs no gradient, and the reentrant kind would then give the layers none.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
