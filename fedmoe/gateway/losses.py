"""Matrix of held-out losses, models by domains, with the loss of every block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedmoe.lora.adapter import Float64Array

BASE = "base"


@dataclass(frozen=True)
class LossMatrix:
    """Mean held-out loss in nats per predicted token: `losses[model][domain]`; `tokens[domain]` were predicted.

    Where they were measured, `block_losses[model][domain]` has the mean of every block and `block_tokens[domain]` how
    many tokens each block predicts; all models were scored on the same blocks, so differences are paired.
    """

    losses: Mapping[str, Mapping[str, float]]
    tokens: Mapping[str, int]
    block_losses: Mapping[str, Mapping[str, Sequence[float]]] = field(default_factory=dict)
    block_tokens: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @classmethod
    def of_blocks(
        cls, block_losses: Mapping[str, Mapping[str, Sequence[float]]], block_tokens: Mapping[str, Sequence[int]]
    ) -> LossMatrix:
        """The matrix of these block means; raises ValueError for a row that lacks a domain or a block."""
        for model, row in block_losses.items():
            for domain, counts in block_tokens.items():
                count = len(row.get(domain, ()))
                if count != len(counts):
                    raise ValueError(f"{model} has {count} block losses on {domain}, expected {len(counts)}")
        losses = {
            model: {domain: _mean(row[domain], counts) for domain, counts in block_tokens.items()}
            for model, row in block_losses.items()
        }
        tokens = {domain: sum(counts) for domain, counts in block_tokens.items()}
        return cls(losses, tokens, block_losses, block_tokens)

    @property
    def models(self) -> tuple[str, ...]:
        """The rows, the base model first where it is one."""
        return tuple(self.losses)

    @property
    def domains(self) -> tuple[str, ...]:
        """The columns."""
        return tuple(self.tokens)

    def sums(self, model: str, domain: str) -> Float64Array:
        """The summed loss of every block in nats, float64 (blocks,); a block without labels counts nothing."""
        losses, tokens = np.asarray(self.block_losses[model][domain], np.float64), self.block_tokens[domain]
        return np.where(np.asarray(tokens) > 0, losses, 0.0) * np.asarray(tokens, np.float64)

    def with_rows(self, rows: Mapping[str, Mapping[str, Sequence[float]]]) -> LossMatrix:
        """The matrix with further models, whose block means on the same blocks were computed elsewhere."""
        taken = sorted(rows.keys() & self.losses.keys())
        if taken:
            raise ValueError(f"the matrix has rows for {', '.join(taken)} already; give the new ones other names")
        return LossMatrix.of_blocks({**self.block_losses, **rows}, self.block_tokens)

    def routed(self, choices: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
        """The row of a router that gave each block to the model named in `choices[domain]`; for `with_rows`."""
        row = {}
        for domain in self.domains:
            chosen = choices.get(domain, ())
            unknown = sorted(set(chosen) - self.block_losses.keys())
            if unknown or len(chosen) != len(self.block_tokens[domain]):
                raise ValueError(
                    f"{domain} needs one of {', '.join(self.block_losses)} for each of its "
                    f"{len(self.block_tokens[domain])} blocks, got {len(chosen)} choices, unknown {unknown[:5]}"
                )
            row[domain] = [self.block_losses[model][domain][place] for place, model in enumerate(chosen)]
        return row


def _mean(losses: Sequence[float], tokens: Sequence[int]) -> float:
    total = sum(tokens)
    if total == 0:
        raise ValueError(f"no token of these {len(tokens)} blocks is labelled; there is nothing to compare")
    return sum(loss * count for loss, count in zip(losses, tokens, strict=True) if count) / total
