"""A vLLM engine as a run's configuration asks for: on a running server, or on one started for the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import structlog
import torch

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.engines.vllm_engine import VllmEngine
from fedmoe.arena.engines.vllm_server import SERVED_NAME, VllmServer, VllmSettings, loras_needed
from fedmoe.models.base import prepare_base

_log = structlog.get_logger("fedmoe.arena")


@contextmanager
def vllm_engine(
    config: ArenaConfig, folder: Path, stop_tokens: frozenset[int], dtype: torch.dtype
) -> Iterator[VllmEngine]:
    """An engine on a server with room for all policies at every version that a batch may name."""
    model = prepare_base(config.base_model).resolve()
    with ExitStack() as stack:
        url, name = config.engine.url, str(model)
        if url is None:
            settings = _settings(config, model, dtype)
            log = folder / "logs" / "vllm.log"
            _log.info("vllm_server_starts", note="takes half a minute to some minutes", log=str(log))
            url = stack.enter_context(VllmServer(settings, log)).url
            name = SERVED_NAME
        yield stack.enter_context(VllmEngine(url, name, folder / "vllm_adapters", stop_tokens))


def _settings(config: ArenaConfig, model: Path, dtype: torch.dtype) -> VllmSettings:
    assert config.engine.python is not None
    # Frozen opponents are adapters too: as many again as there are policies.
    most = loras_needed(config.policies.count, config.learning.max_staleness) + config.policies.count
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    return VllmSettings(
        config.engine.python,
        model,
        most,
        config.policies.max_rank,
        names[dtype],  # type: ignore[arg-type]
        config.learning.max_prompt_tokens + 512,
        "cuda" if torch.cuda.is_available() else "cpu",
    )
