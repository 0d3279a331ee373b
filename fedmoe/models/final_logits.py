"""Logits and log-probabilities at selected positions only: the output head is a fifth of a small model's work."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from fedmoe.models.tree_attention import TREE_ATTENTION

#: How many logits are there at once (32 MB in float32, which the C library keeps for the next part); those of a whole
#: batch would be larger than all the rest.
_LOGITS_AT_ONCE = 1 << 23

#: Settings with which a model's logits are more than its output head; unset or 0 they do nothing.
_SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling", "logits_scale")

#: Models whose forward pass was read: the output head of the last hidden states of `base_model`, and nothing else.
_PLAIN_HEADS = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


class UnsupportedModelError(ValueError):
    """A model whose computation this code would get wrong."""


def check_causal_model(model: PreTrainedModel) -> None:
    """Refuse a model whose logits are more than head(last hidden state), or that would not honour a given mask."""
    config = model.config.get_text_config()
    scaled = _scaled(model)
    if scaled:
        raise UnsupportedModelError(f"{type(model).__name__} changes its logits by {', '.join(scaled)}: not supported")
    if config._attn_implementation not in ("sdpa", TREE_ATTENTION):
        raise UnsupportedModelError(
            f"attention masks of trees need attn_implementation='sdpa', got {config._attn_implementation!r}"
        )
    if type(model.get_output_embeddings()) is not nn.Linear:
        raise UnsupportedModelError(f"the output head of {type(model).__name__} is not a plain linear layer")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedModelError(f"{type(model).__name__} has layers of kind {sorted(kinds)}; only full attention")


def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether the model's logits are its output head, a frozen linear layer, of its last hidden states and no more."""
    head = model.get_output_embeddings()
    plain = type(head) is nn.Linear and not any(each.requires_grad for each in head.parameters())
    return plain and type(model).__name__ in _PLAIN_HEADS and not _scaled(model)


def _scaled(model: PreTrainedModel) -> list[str]:
    config = model.config.get_text_config()
    return [name for name in _SCALED if getattr(config, name, None) not in (None, 0, 0.0, 1, 1.0)]


def logits_of(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """hidden (n, width), the decoder's last hidden states -> logits (n, vocabulary), float32."""
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    return logits.float()


def selected_logprobs(
    model: PreTrainedModel,
    hidden: torch.Tensor,
    places: NDArray[np.int64],
    targets: NDArray[np.int64],
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of `targets` (m,) at `places` (m,), ascending rows of `hidden` (n, width): float32 (m,).

    And the entropy in nats at each place (m,), without gradient. Gradients go to `hidden` only. At no time are there
    more than a part of the logits, and none are kept for the backward pass.
    """
    head = model.get_output_embeddings()
    step = max(1, _LOGITS_AT_ONCE // head.weight.shape[0])
    parts = (*range(0, len(hidden), step), len(hidden))
    bounds = tuple(np.searchsorted(places, parts).tolist())
    where, what = (torch.from_numpy(array).to(hidden.device) for array in (places, targets))
    pair: tuple[torch.Tensor, torch.Tensor] = _ChosenLogprobs.apply(
        hidden, head.weight, head.bias, where, what, (parts, bounds), temperature
    )
    return pair


class _ChosenLogprobs(torch.autograd.Function):  # type: ignore[misc]
    """The gradient of log p_t with respect to the hidden state is (W_t - sum_v p_v W_v) / temperature.

    The sum is known in the forward pass, before any gradient, so nothing as wide as the vocabulary has to be kept.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        places: torch.Tensor,
        targets: torch.Tensor,
        parts: tuple[tuple[int, ...], tuple[int, ...]],
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies, means = [], [], []
        (starts, bounds), needs_gradient = parts, ctx.needs_input_grad[0]
        for start, stop, begin, end in zip(starts, starts[1:], bounds, bounds[1:], strict=False):
            inside, chosen = places[begin:end] - start, targets[begin:end]
            logits = functional.linear(hidden[start:stop], weight, bias).float().div_(temperature)
            logits -= logits.amax(dim=-1, keepdim=True)
            shares = logits.exp()
            total = shares.sum(dim=-1)
            logprobs.append(logits[inside, chosen] - total.log()[inside])
            expected = torch.bmm(shares[:, None], logits[:, :, None])[:, 0, 0] / total
            entropies.append((total.log() - expected)[inside])
            if needs_gradient:
                means.append((shares.to(weight.dtype) @ weight).float() / total[:, None])
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        ctx.temperature = temperature
        ctx.save_for_backward(weight, places, targets, *([torch.cat(means)] if needs_gradient else []))
        return torch.cat(logprobs), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor, _: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        weight, places, targets, means = ctx.saved_tensors
        upstream = (gradient / ctx.temperature)[:, None]
        towards = upstream * (weight[targets].float() - means[places])
        back = torch.zeros_like(means)
        # Several tokens may follow one node. Each way is the one that adds in a fixed order on its device.
        if back.is_cuda:
            back.index_put_((places,), towards, accumulate=True)
        else:
            back.index_add_(0, places, towards)
        return back.to(weight.dtype), None, None, None, None, None, None
