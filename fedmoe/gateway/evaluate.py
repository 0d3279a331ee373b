"""Held-out losses: every adapter on every domain, beside the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedmoe.datasets.packing import Block
from fedmoe.lora.adapter import Adapter
from fedmoe.models.base import LoadedBase
from fedmoe.models.schedule import LoraConfig
from fedmoe.qwen_finetune import QwenLoRAExpert

BASE = "base"


@dataclass(frozen=True)
class LossMatrix:
    """Mean held-out loss in nats per predicted token: `losses[model][domain]`; `tokens[domain]` were predicted."""

    losses: Mapping[str, Mapping[str, float]]
    tokens: Mapping[str, int]


def evaluate(
    base: LoadedBase,
    adapters: Mapping[str, Adapter],
    held_out: Mapping[str, Sequence[Block]],
    batch_size: int = 4,
    progress: Callable[[str], None] = lambda _: None,
) -> LossMatrix:
    """The loss of the base model and of every adapter on every domain, all on the same blocks; leaves `base` bare."""
    first = next(iter(adapters.values()))
    targets = tuple(module.name for module in first.layout.modules)
    model = QwenLoRAExpert(base, LoraConfig(first.rank, first.alpha, target_modules=targets))
    losses: dict[str, dict[str, float]] = {}
    tokens: dict[str, int] = {}
    try:
        # An adapter of zeros changes nothing, so the base model goes through the very same code.
        for name, adapter in {BASE: Adapter.zeros(first.layout, first.alpha), **adapters}.items():
            model.load_adapter(adapter)
            losses[name] = {}
            for domain, blocks in held_out.items():
                progress(f"{name} on {domain}")
                result = model.evaluate(blocks, batch_size)
                losses[name][domain], tokens[domain] = result.loss, result.tokens
    finally:
        model.attached.detach()
    return LossMatrix(losses, tokens)
