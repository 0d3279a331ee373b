"""The rollout engine that a configuration asks for, made and closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.metadata import entry_points
from pathlib import Path

import torch

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.engines.protocol import Engine, EngineError
from fedmoe.arena.engines.transformers_engine import TransformersEngine
from fedmoe.models.base import ChatTemplate, LoadedBase, load_base, stop_tokens
from fedmoe.models.multilora import MultiLora
from fedmoe.models.sampling import SamplingLimits

#: Entry points of this group add engines: name -> a callable like `make_engine`'s own parts, a context manager.
ENTRY_POINTS = "fedmoe.engines"

#: From configuration, run folder and base model to an engine that is closed at the end.
EngineMaker = Callable[[ArenaConfig, Path, LoadedBase], AbstractContextManager[Engine]]


def _installed(kind: str) -> EngineMaker:
    points = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if kind not in points:
        known = ", ".join(sorted({"transformers", "vllm", *points}))
        raise EngineError(f"there is no engine {kind!r}; there are: {known}")
    maker: EngineMaker = points[kind].load()
    return maker


@contextmanager
def make_engine(
    config: ArenaConfig, folder: Path, base: LoadedBase, multi: MultiLora, device: torch.device
) -> Iterator[Engine]:
    """Transformers on the learner's model (a copy of it where `device` is another one), vLLM, or an installed one."""
    if config.engine.kind == "vllm":
        from fedmoe.arena.engines.vllm_start import vllm_engine

        with vllm_engine(config, folder, stop_tokens(base), base.dtype) as served:
            yield served
        return
    if config.engine.kind != "transformers":
        with _installed(config.engine.kind)(config, folder, base) as offered:
            yield offered
        return
    limits = SamplingLimits(rows=config.engine.rows)
    if device != base.device:
        chat = ChatTemplate.given(config.chat_template, config.chat_template_kwargs)
        base = load_base(config.base_model, device, base.dtype, chat)
        multi = MultiLora(base.model)
    engine = TransformersEngine(base, multi, limits)
    try:
        yield engine
    finally:
        engine.close()
