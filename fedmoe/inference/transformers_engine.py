"""The rollout engine on transformers, in this process, on the same base model that the learner trains on."""

from __future__ import annotations

from collections.abc import Sequence

from fedmoe.inference.engine import AdapterKey, EngineError, Sample, SampleRequest
from fedmoe.lora.adapter import Adapter, FloatArray
from fedmoe.models.base import LoadedBase, stop_tokens
from fedmoe.models.final_logits import check_causal_model
from fedmoe.models.multilora import MultiLora
from fedmoe.models.policy_logprobs import score_tokens
from fedmoe.models.sampling import SampleSpec, SamplingLimits, sample

__all__ = ["TransformersEngine", "stop_tokens"]


class TransformersEngine:
    """Samples from frozen copies of the policies' versions, kept in the compute dtype beside the live ones.

    Several threads may use it at once; `limits` can be exchanged while it runs (the memory guard does).
    """

    def __init__(self, base: LoadedBase, multi: MultiLora, limits: SamplingLimits | None = None) -> None:
        check_causal_model(base.model)
        self._base = base
        self._multi = multi
        self._keys: set[AdapterKey] = set()
        self.limits = limits or SamplingLimits()
        self._stop_tokens = stop_tokens(base)

    @property
    def context(self) -> int | None:
        """The positions that the base model was made for, if its configuration names them."""
        positions = getattr(self._base.model.config, "max_position_embeddings", None)
        return positions if isinstance(positions, int) else None

    def load(self, key: AdapterKey, adapter: Adapter) -> None:
        """Make a version available."""
        if key in self._keys:
            raise EngineError(f"{key} is loaded already; a version is never loaded twice")
        self._multi.add(str(key), adapter)
        self._keys.add(key)

    def unload(self, key: AdapterKey) -> None:
        """Unload a version; raises EngineError for one that is not loaded."""
        self._multi.remove(self._name(key) or "")
        self._keys.remove(key)

    def loaded(self) -> frozenset[AdapterKey]:
        """The versions that can be sampled from."""
        return frozenset(self._keys)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """Answer all requests, in their order."""
        specs = [
            SampleSpec(
                self._name(request.adapter), request.prompt, request.max_new_tokens, request.temperature, request.seed
            )
            for request in requests
        ]
        try:
            results = sample(self._base.model, self._multi, specs, self._stop_tokens, self.limits)
        except FloatingPointError as error:
            raise EngineError(str(error)) from error
        return [Sample(result.tokens, result.logprobs, result.stopped) for result in results]

    def score(self, key: AdapterKey | None, prompt: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """The log-probability of each of `tokens` after `prompt`."""
        scores: FloatArray = score_tokens(self._base.model, self._multi, self._name(key), prompt, tokens)
        return scores

    def close(self) -> None:
        """Unload all versions."""
        for key in tuple(self._keys):
            self.unload(key)

    def _name(self, key: AdapterKey | None) -> str | None:
        if key is not None and key not in self._keys:
            loaded = ", ".join(sorted(map(str, self._keys))) or "none"
            raise EngineError(f"{key} is not loaded; loaded are: {loaded}")
        return None if key is None else str(key)
