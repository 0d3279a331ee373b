"""Measures held-out losses: every adapter on every domain, beside the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedmoe.datasets.report import DataReport
from fedmoe.datasets.tokens.packing import Block, collate, pack
from fedmoe.gateway.losses import BASE, LossMatrix
from fedmoe.gateway.routers import SequenceRouter, candidates, choose
from fedmoe.lora.adapter import Adapter
from fedmoe.models.base import LoadedBase, context_length, pad_token
from fedmoe.models.chat_frame import ChatFrame
from fedmoe.models.multilora import MultiLora
from fedmoe.models.packed import count_targets
from fedmoe.models.policy_logprobs import log_likelihoods
from fedmoe.models.prepare_data import DataOptions, prepare_samples
from fedmoe.models.prompt_features import prompt_features
from fedmoe.models.step_memory import resolve_max_length
from fedmoe.models.training_config import LoraConfig
from fedmoe.qwen_finetune import QwenLoRAExpert

__all__ = ["BASE", "ROUTED_BY", "LossMatrix", "evaluate", "held_out_blocks", "routed_to"]

#: A block is routed by so many of its first tokens, as if they were the prompt.
ROUTED_BY = 32


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
    losses: dict[str, dict[str, Sequence[float]]] = {}
    try:
        # An adapter of zeros changes nothing, so the base model goes through the very same code.
        for name, adapter in {BASE: Adapter.zeros(first.layout, first.alpha), **adapters}.items():
            model.load_adapter(adapter)
            losses[name] = {}
            for domain, blocks in held_out.items():
                progress(f"{name} on {domain}")
                losses[name][domain] = model.evaluate(blocks, batch_size).block_losses
    finally:
        model.attached.detach()
    tokens = {domain: [count_targets(collate([block])) for block in blocks] for domain, blocks in held_out.items()}
    return LossMatrix.of_blocks(losses, tokens)


def held_out_blocks(
    file: str | Path,
    base: LoadedBase,
    max_length: int | None,
    limit: int | None = None,
    options: DataOptions | None = None,
    report: Callable[[DataReport], None] = lambda _: None,
) -> list[Block]:
    """Data read as a worker reads them, packed in an order that is the same in every run; the first `limit`.

    `max_length` None is 1024 tokens, or the model's context if that is shorter. `report` gets the report on the rows.
    Raises DataError for data that training would refuse, and LengthError for a length beyond the context.
    """
    length = resolve_max_length(max_length, context_length(base))
    data = prepare_samples(file, base.tokenizer, length, options)
    report(data.report)
    return pack(data.samples, length, seed=0, pad_id=pad_token(base))[:limit]


def routed_to(
    base: LoadedBase,
    router: SequenceRouter,
    adapters: Mapping[str, Adapter],
    held_out: Mapping[str, Sequence[Block]],
    merged: str,
) -> dict[str, list[str]]:
    """domain -> for each block the model that its first `ROUTED_BY` tokens are given to: an expert, or `merged`.

    As the server does it: without what the chat template puts before a conversation, the router's likely experts and
    the merged adapter, ranked again by how well each explains those tokens. `adapters` has all of them by name. For
    `LossMatrix.routed`; leaves `base` bare, as it must be.
    """
    frame = ChatFrame.of(base.tokenizer)
    prompts = {
        domain: [list(frame.removed(block.input_ids[block.segment_ids >= 0].tolist())[:ROUTED_BY]) for block in blocks]
        for domain, blocks in held_out.items()
    }
    likely = {
        domain: [
            candidates(text, router.names, row)
            for text, row in zip(texts, router.probabilities(prompt_features(base, texts)), strict=True)
        ]
        for domain, texts in prompts.items()
    }
    multi = MultiLora(base.model, [module.name for module in adapters[merged].layout.modules])
    try:
        for name, adapter in adapters.items():
            multi.add(name, adapter)
        choices: dict[str, list[str]] = {domain: [] for domain in likely}
        for domain, prompts_of_domain in likely.items():
            for prompt in prompts_of_domain:
                models = [*prompt.log_priors, merged]
                likelihoods = log_likelihoods(base.model, multi, [(prompt.text, name) for name in models])
                choices[domain].append(choose(prompt, dict(zip(models, likelihoods, strict=True)), merged))
        return choices
    finally:
        multi.detach()
