"""Collation for AReaL's actor: one padded dictionary of tensors per sequence of L = P + T tokens."""

from __future__ import annotations

import torch

from fedmoe.areal.batch import IntArray
from fedmoe.lora.adapter import FloatArray

TensorRow = dict[str, torch.Tensor]


def sequence_row(prompt: IntArray, tokens: IntArray) -> TensorRow:
    """What a forward pass needs: `input_ids` and `attention_mask`, (1, L)."""
    ids = torch.cat([torch.from_numpy(prompt.copy()), torch.from_numpy(tokens.copy())]).long()
    return {"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.bool)}


def ppo_row(
    prompt: IntArray,
    tokens: IntArray,
    behaviour: FloatArray,
    advantages: FloatArray,
    proximal: torch.Tensor,
    reward: float,
    version: int,
) -> TensorRow:
    """What `ppo_update` needs, as `compute_advantages` would leave it, but with our advantages.

    Position t of `loss_mask`, `logprobs`, `prox_logp` and `advantages` is about token t + 1, so the T sampled tokens
    lie at [P - 1, L - 1). `behaviour`, `advantages`: float32 (T,). `proximal`: (1, L), as `compute_logp` gives it.
    """
    length, sampled = len(prompt) + len(tokens), slice(len(prompt) - 1, len(prompt) + len(tokens) - 1)

    def spread(values: torch.Tensor, elsewhere: float = 0.0) -> torch.Tensor:
        row = torch.full((1, length), elsewhere, dtype=values.dtype)
        row[0, sampled] = values
        return row

    mask = spread(torch.ones(len(tokens)))
    return {
        **sequence_row(prompt, tokens),
        "loss_mask": mask,
        "logprobs": spread(torch.from_numpy(behaviour.copy())),
        "prox_logp": proximal.cpu(),
        "advantages": spread(torch.from_numpy(advantages.copy())),
        "versions": spread(torch.full((len(tokens),), version, dtype=torch.int32), elsewhere=-1),
        "rewards": torch.tensor([reward]),
        # Only for AReaL's own log.
        "kl_rewards": torch.zeros(1, length),
        "tot_rewards": reward * mask,
    }
