"""LossTokens to compute losses of: shared by the laws and by the comparison with other implementations."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from fedmoe.arena.learning.config import LossConfig
from fedmoe.arena.learning.loss import LOSSES, LossStatistics, LossTokens

LossName = Literal["reinforce", "clipped", "decoupled"]
AggregationName = Literal["token_mean", "sequence_mean", "constant"]


def random_tokens(seed: int, count: int = 24, spread: float = 0.5) -> LossTokens:
    """Log-probabilities that lie `spread` nats apart, in float64; about one token in four is not learned from."""
    draw = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(count, generator=draw, dtype=torch.float64)

    behaviour = -noise().abs() - 0.1
    proximal = behaviour + spread * noise()
    current = (proximal + spread * noise()).requires_grad_()
    return LossTokens(
        current=current,
        proximal=proximal,
        behaviour=behaviour,
        advantages=2 * noise(),
        mask=torch.rand(count, generator=draw) < 0.75,
        weights=0.5 + torch.rand(count, generator=draw, dtype=torch.float64),
    )


def part(tokens: LossTokens, first: int, last: int) -> LossTokens:
    """Some of the tokens, as a micro-batch of their own on the same leaf."""
    where = slice(first, last)
    return LossTokens(
        current=tokens.current[where],
        proximal=tokens.proximal[where],
        behaviour=tokens.behaviour[where],
        advantages=tokens.advantages[where],
        mask=tokens.mask[where],
        weights=tokens.weights[where],
    )


def fresh(tokens: LossTokens) -> LossTokens:
    """The same numbers with a leaf of their own."""
    return replace(tokens, current=tokens.current.detach().clone().requires_grad_())


def computed(tokens: LossTokens, config: LossConfig, denominator: float) -> tuple[float, torch.Tensor, LossStatistics]:
    """Loss, its gradient by `current`, and the statistics."""
    mine = fresh(tokens)
    loss, statistics = LOSSES[config.loss](mine, config, denominator)
    (gradient,) = torch.autograd.grad(loss, mine.current)
    return loss.item(), gradient, statistics
