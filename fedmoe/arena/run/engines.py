"""The rollout engine that a configuration asks for, made and closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path

import structlog
import torch

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run.options import RunError, RunOptions
from fedmoe.inference.engine import Engine, EngineError
from fedmoe.inference.transformers_engine import TransformersEngine
from fedmoe.inference.vllm.engine import VllmEngine
from fedmoe.inference.vllm.server import SERVED_NAME, VllmServer, VllmSettings, loras_needed
from fedmoe.models.base import ChatTemplate, LoadedBase, load_base, prepare_base, stop_tokens
from fedmoe.models.multilora import MultiLora
from fedmoe.models.sampling import SamplingLimits
from fedmoe.runtime.placement import place
from fedmoe.runtime.plugins import PluginGroup

_log = structlog.get_logger("fedmoe.arena")

#: From configuration, run folder and base model to an engine that is closed at the end. Installed packages offer theirs
#: in the entry-point group `fedmoe.engines`.
EngineMaker = Callable[[ArenaConfig, Path, LoadedBase], AbstractContextManager[Engine]]


def place_run(config: ArenaConfig, options: RunOptions) -> tuple[torch.device, torch.device, str]:
    """The devices of rollouts in this process and of the learner, and the plan in words.

    Raises DeviceError for one that is not there, RunError for a rollout device beside actors that Ray places.
    """
    learner = config.learning.device if options.learner_device == "auto" else options.learner_device
    engine = config.engine
    if not engine.actors:
        return place(options.rollout_device, learner)
    if options.rollout_device != "auto" and (engine.gpus_per_actor or options.rollout_device != "cpu"):
        raise RunError(
            f"--rollout-device {options.rollout_device} is for rollouts in this process, and Ray places those of "
            "[engine] actors: leave it out and set gpus_per_actor"
        )
    _, device, _ = place("auto", learner)
    plan = f"rollouts by {engine.actors} Ray actors with {engine.gpus_per_actor:g} GPUs each, learning on {device}"
    return torch.device("cpu"), device, plan


def make_engine(
    config: ArenaConfig, folder: Path, base: LoadedBase, multi: MultiLora, device: torch.device
) -> AbstractContextManager[Engine]:
    """Transformers on the learner's model (a copy of it where `device` is another one), vLLM, or an installed one."""
    makers: dict[str, EngineMaker] = {"transformers": partial(_transformers, multi, device), "vllm": _vllm}
    return PluginGroup("fedmoe.engines", "engine", EngineError, makers).get(config.engine.kind)(config, folder, base)


@contextmanager
def _transformers(
    multi: MultiLora, device: torch.device, config: ArenaConfig, folder: Path, base: LoadedBase
) -> Iterator[Engine]:
    if device != base.device:
        chat = ChatTemplate.from_options(config.chat_template, config.chat_template_kwargs)
        base = load_base(config.base_model, device, base.dtype, chat)
        multi = MultiLora(base.model)
    engine = TransformersEngine(base, multi, SamplingLimits(rows=config.engine.rows))
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _vllm(config: ArenaConfig, folder: Path, base: LoadedBase) -> Iterator[VllmEngine]:
    """An engine on a server with room for all policies at every version that a batch may name."""
    model = prepare_base(config.base_model).resolve()
    with ExitStack() as stack:
        url, name = config.engine.url, str(model)
        if url is None:
            settings = _settings(config, model, base.dtype)
            log = folder / "logs" / "vllm.log"
            _log.info("vllm_server_starts", note="takes half a minute to some minutes", log=str(log))
            url = stack.enter_context(VllmServer(settings, log)).url
            name = SERVED_NAME
        yield stack.enter_context(VllmEngine(url, name, folder / "vllm_adapters", stop_tokens(base)))


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
