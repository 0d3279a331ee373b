"""The rollout engine protocol: samples from versions of adapters, with the log-probability of every token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedmoe.lora.adapter import Adapter, FloatArray
from fedmoe.runtime.errors import ExpectedError


class EngineError(ExpectedError, RuntimeError):
    """An engine that cannot sample, or does not have the adapter asked for."""


@dataclass(frozen=True, slots=True, order=True)
class AdapterKey:
    """Which weights: a name and a version, never reused. Engines name adapters `name@version` with it."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """One continuation wanted. `adapter` None is the base model alone; `seed` fixes the draw.

    `temperature` 0 takes the likeliest token. Sampling ends at the tokenizer's end-of-sequence token (which belongs to
    the continuation) or after `max_new_tokens`.
    """

    adapter: AdapterKey | None
    prompt: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class Sample:
    """A continuation: token ids and, for each, the natural logarithm of its probability at the request's temperature.

    (At temperature 0 the log-probabilities are those of temperature 1.) `stopped`: ended by itself, not by the limit.
    """

    tokens: tuple[int, ...]
    logprobs: FloatArray
    stopped: bool


class Engine(Protocol):
    """A source of samples that holds several adapters at once.

    It may have a `context`: the most tokens of prompt and answer together, see `context_limit`.
    """

    def load(self, key: AdapterKey, adapter: Adapter) -> None:
        """Make one version of one policy available; loading a key again is an error."""

    def unload(self, key: AdapterKey) -> None:
        """Unload a version; unknown keys are an error."""

    def loaded(self) -> frozenset[AdapterKey]:
        """The adapters that can be sampled from."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """Answer all requests, in their order, in as few batches as fit; raises EngineError for an unknown adapter."""

    def score(self, key: AdapterKey | None, prompt: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """The log-probability (temperature 1) of each of `tokens` after `prompt`, for verifying a synchronisation."""

    def close(self) -> None:
        """Release what the engine holds."""


def context_limit(engine: Engine) -> int | None:
    """The most tokens of prompt and answer together that the engine takes; None where it has no `context`."""
    limit: int | None = getattr(engine, "context", None)
    return limit
