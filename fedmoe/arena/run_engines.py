"""The rollout engine that a configuration asks for, made and closed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.engines.protocol import Engine
from fedmoe.arena.engines.transformers_engine import TransformersEngine, stop_tokens
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.multilora import MultiLora
from fedmoe.models.sampling import SamplingLimits


@contextmanager
def make_engine(
    config: ArenaConfig, folder: Path, base: LoadedBase, multi: MultiLora, device: torch.device
) -> Iterator[Engine]:
    """Transformers on the learner's model, or on a copy of it where `device` is another one; or vLLM."""
    if config.engine.kind == "vllm":
        from fedmoe.arena.engines.vllm_start import vllm_engine

        with vllm_engine(config, folder, stop_tokens(base), base.dtype) as served:
            yield served
        return
    limits = SamplingLimits(rows=config.engine.rows)
    if device != base.device:
        base = load_base(config.base_model, device, base.dtype)
        multi = MultiLora(base.model)
    engine = TransformersEngine(base, multi, limits)
    try:
        yield engine
    finally:
        engine.close()
