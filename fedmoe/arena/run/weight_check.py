"""Checks a remote engine after every published version: its log-probabilities against the trainer's."""

from __future__ import annotations

import math
from contextlib import suppress

import numpy as np

from fedmoe.arena.learning.learner import PolicyLearner
from fedmoe.arena.rollout.chat import Codec
from fedmoe.arena.tasks.task import HELD_OUT, Lineup, Task, TaskError
from fedmoe.inference.engine import AdapterKey, Engine, SampleRequest, context_limit
from fedmoe.inference.verify import Probe, verify_sync
from fedmoe.lora.adapter import FloatArray

#: Nats by which a single token may differ: two implementations in bfloat16 differ by up to about 0.1, measured.
TOLERANCE = 0.5
_MORE_THAN_ROUNDING = 0.05
_PROBES = 2
_ATTEMPTS = 100
_TOKENS = 8


def make_probes(task: Task, engine: Engine, codec: Codec) -> tuple[Probe, ...]:
    """Prompts of held-out episodes, each continued by the base model's likeliest tokens.

    Raises TaskError where none of a hundred episodes has a prompt that fits.
    """
    context = context_limit(engine) or math.inf
    prompts: list[tuple[int, ...]] = []
    for index in range(_ATTEMPTS):
        with suppress(TaskError):  # a prompt beyond max_prompt_tokens ends one episode only, in training too
            episode = task.start(HELD_OUT + index, Lineup.alone(max(1, task.seats[0])))
            prompt = codec.prompt(episode.observe(episode.to_act()[0]))
            prompts += [prompt] if len(prompt) + _TOKENS <= context else []
        if len(prompts) == _PROBES:
            break
    if not prompts:
        raise TaskError(
            f"none of {_ATTEMPTS} first prompts of {task.name} fits; raise max_prompt_tokens (the engine takes "
            f"{context} tokens) or take a task with shorter observations"
        )
    requests = [SampleRequest(None, prompt, _TOKENS, 0.0, 0) for prompt in prompts]
    samples = engine.sample(requests)
    return tuple(Probe(prompt, sample.tokens) for prompt, sample in zip(prompts, samples, strict=True))


class WeightCheck:
    """Compares an engine's log-probabilities of fixed probes with the trainer's own; EngineError when they differ."""

    def __init__(self, learner: PolicyLearner, engine: Engine, probes: tuple[Probe, ...]) -> None:
        self._learner = learner
        self._engine = engine
        self._probes = probes
        self._last: dict[str, list[FloatArray]] = {}

    def __call__(self, key: AdapterKey, previous: AdapterKey | None) -> None:
        """`key` was just published; `previous` is the version before it, if it has other weights and is still there.

        The engine must have moved where the trainer moved by more than rounding.
        """
        references = [self._learner.score(key.name, probe.prompt, probe.tokens) for probe in self._probes]
        before = self._last.get(key.name, references)
        moved = max(float(np.abs(now - then).max()) for now, then in zip(references, before, strict=True))
        self._last[key.name] = references
        verify_sync(
            self._engine, references, key, self._probes, TOLERANCE, previous if moved > _MORE_THAN_ROUNDING else None
        )
