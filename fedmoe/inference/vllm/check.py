"""Checks that a vLLM server computes what our own model computes, by requests like those of any client.

The server continues a few prompts under a version, and our own model says how likely each of these tokens is under it.
The other way round, scoring given tokens on the server, needs it alone: on a CPU vLLM dies where a prompt is scored
beside other requests. For every version all answers under way would have to end first, while new ones wait. And
scoring goes round the server's prefix cache, which answers do not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.inference.engine import AdapterKey, Engine, EngineError, SampleRequest
from fedmoe.inference.verify import Probe
from fedmoe.lora.adapter import Adapter, FloatArray

#: Nats by which one token may differ: two implementations in bfloat16 differ by up to about 0.2, measured.
TOLERANCE = 0.5
_MORE_THAN_ROUNDING = 0.05
# What stands still moves by the rounding of another batch only.
_STANDS_STILL = 0.1
_TOKENS = 4

#: The log-probabilities that our own model gives tokens after prompts with an adapter (None: the base model alone).
Reference = Callable[[Adapter | None, Sequence[Probe]], Sequence[FloatArray]]


@dataclass(frozen=True, slots=True)
class ScoreComparison:
    """The server's continuations of the prompts, and the log-probabilities of their tokens, (T,): served and ours."""

    probes: tuple[Probe, ...]
    served: FloatArray
    ours: FloatArray

    @property
    def gap(self) -> float:
        """The largest difference in nats; NaN if a number is."""
        return float(np.abs(self.served - self.ours).max())


class VersionCheck:
    """Compares versions on `engine` with our own model, and each with the one of its name before it.

    Both checks raise EngineError where the server does not compute what we do; only what was right is remembered.
    """

    def __init__(self, engine: Engine, reference: Reference, prompts: Sequence[tuple[int, ...]]) -> None:
        self._engine = engine
        self._reference = reference
        self._prompts = prompts
        self._former: dict[str, ScoreComparison] = {}

    def base(self) -> None:
        """Refuse a server of another base model."""
        comparison = self._compare(None, None)
        if not comparison.gap <= TOLERANCE:
            raise EngineError(
                f"the server's base model is up to {comparison.gap:.3g} nats a token off ours: it serves another model"
            )

    def version(self, key: AdapterKey, adapter: Adapter) -> None:
        """Refuse a version that the server computes differently from us, or exactly as the one before it."""
        comparison = self._compare(key, adapter)
        if not comparison.gap <= TOLERANCE:
            raise EngineError(
                f"the server's log-probabilities under {key} are up to {comparison.gap:.4g} nats off ours (tolerance "
                f"{TOLERANCE:g}); it computes with other weights or in another precision: see its log, and whether "
                "it serves the same base model"
            )
        if key.name in self._former and stands_still(comparison, self._former[key.name]):
            raise EngineError(
                f"the server's log-probabilities under {key} are those of the version before, although the weights "
                "differ; it still serves the old one: see its log, and whether it reads the folder that we write"
            )
        self._former[key.name] = comparison

    def _compare(self, key: AdapterKey | None, adapter: Adapter | None) -> ScoreComparison:
        # Drawn tokens say more about the weights than the likeliest, which many weights agree on.
        requests = [SampleRequest(key, prompt, _TOKENS, 1.0, seed) for seed, prompt in enumerate(self._prompts)]
        samples = self._engine.sample(requests)
        probes = tuple(Probe(prompt, sample.tokens) for prompt, sample in zip(self._prompts, samples, strict=True))
        ours, served = self._reference(adapter, probes), [sample.logprobs for sample in samples]
        return ScoreComparison(probes, np.concatenate(served), np.concatenate(ours))


def stands_still(now: ScoreComparison, former: ScoreComparison) -> bool:
    """Whether our model moved from one version to the next and the server did not.

    Old weights draw the same tokens again. In bfloat16, rounding can hide a move of a few hundredths of a nat.
    """
    if now.probes != former.probes:
        return False
    moved, served = (float(np.abs(a - b).max()) for a, b in ((now.ours, former.ours), (now.served, former.served)))
    return moved > _MORE_THAN_ROUNDING and served < _STANDS_STILL * moved
