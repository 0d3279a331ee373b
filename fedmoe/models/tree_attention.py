"""Attention with tree masks for bfloat16 training on CPUs, where PyTorch's fused kernel has a slow backward pass.

Measured on SmolLM2's shapes (AVX512_BF16, one thread), forward and backward: 30 ms for 4 rows of 232 nodes against 15
here, 33 against 7 for 16 rows of 68, and no difference from 512 nodes on. As the fused kernel does, it keeps no scores.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TREE_ATTENTION = "fedmoe_tree"


def use_tree_attention(model: PreTrainedModel) -> None:
    """Let a model that was loaded with attention "sdpa" train with `tree_attention`; all else stays as it was."""
    AttentionInterface.register(TREE_ATTENTION, _attend)
    AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
    model.set_attn_implementation(TREE_ATTENTION)


def tree_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention of query (rows, heads, n, width) to key, value (rows, heads / groups, n, width) -> like query.

    `mask`: bool (rows, 1, n, n), True where a node may look; every node must see at least one.
    """
    out: torch.Tensor = _TreeAttention.apply(query, key, value, mask, scale)
    return out


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: object,  # the interface is transformers': what is not known here is sdpa's business
) -> tuple[torch.Tensor, None]:
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    special = dropout or any(others.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if (
        trains
        and not special
        and attention_mask is not None
        and attention_mask.dtype == torch.bool
        and attention_mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2])
        and query.shape[2] == key.shape[2]
    ):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return tree_attention(query, key, value, attention_mask, scale).transpose(1, 2).contiguous(), None
    fused: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )
    return fused


class _TreeAttention(torch.autograd.Function):  # type: ignore[misc]
    """The heads that share a key are rows of one matrix, so keys and values need not be repeated."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        rows, heads, size, width = query.shape
        groups = rows * key.shape[1]
        queries = query.reshape(groups, -1, width)
        keys, values = key.reshape(groups, size, width), value.reshape(groups, size, width)
        out = torch.bmm(_shares(queries, keys, mask, scale), values)
        ctx.save_for_backward(queries, keys, values, mask, out)
        ctx.scale = scale
        return out.view(rows, heads, size, width)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        queries, keys, values, mask, out = ctx.saved_tensors
        (rows, heads, size, width), upstream = gradient.shape, gradient.reshape(out.shape)
        shares = _shares(queries, keys, mask, ctx.scale)
        to_values = torch.bmm(shares.transpose(1, 2), upstream)
        # Softmax backwards: share * (its gradient - the mean gradient), the mean being given . out.
        mean = (upstream * out).sum(dim=-1, keepdim=True)
        to_scores = torch.bmm(upstream, values.transpose(1, 2)).sub_(mean).mul_(shares).mul_(ctx.scale)
        to_queries = torch.bmm(to_scores, keys).view(rows, heads, size, width)
        to_keys = torch.bmm(to_scores.transpose(1, 2), queries)
        return to_queries, to_keys.view(rows, -1, size, width), to_values.view(rows, -1, size, width), None, None


def _shares(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Softmax of the scores, (rows * keys' heads, heads a key * n, n)."""
    rows, size = mask.shape[0], mask.shape[-1]
    scores = torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    scores.view(rows, -1, size, size).masked_fill_(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1)
