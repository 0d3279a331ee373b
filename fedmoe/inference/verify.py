"""Verifies after every synchronisation that the engine computes with the weights that the trainer has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from fedmoe.inference.engine import AdapterKey, Engine, EngineError
from fedmoe.lora.adapter import FloatArray


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed continuation of a fixed prompt, as token ids; its log-probabilities tell one version from another."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SyncReport:
    """Differences in nats per token: between engine and trainer, and between the engine's version and the one before.

    `change` is None where there was no previous version to compare with.
    """

    largest_gap: float
    mean_gap: float
    change: float | None


@dataclass(frozen=True, slots=True)
class Proof:
    """What an engine has to show of the version `key`: the arguments of `verify_sync`, see there."""

    reference_scores: tuple[FloatArray, ...]
    key: AdapterKey
    probes: tuple[Probe, ...]
    tolerance: float
    previous_key: AdapterKey | None = None


@runtime_checkable
class ReplicatedEngine(Protocol):
    """An engine of several replicas, each of which has to prove a version by itself."""

    def verify(self, proof: Proof) -> SyncReport:
        """`verify_sync` on every replica; the report of the worst, or the error of one that fails."""


def verify_sync(
    engine: Engine,
    reference_scores: Sequence[FloatArray],
    key: AdapterKey,
    probes: Sequence[Probe],
    tolerance: float,
    previous_key: AdapterKey | None = None,
) -> SyncReport:
    """Compare the engine's scores of `probes` under `key` with the trainer's own, one float32 (T,) for each probe.

    Raises EngineError when a token differs by more than `tolerance` nats, or when the scores under `previous_key` are
    exactly the same: the engine then still serves the old weights. Give `previous_key` only if the weights differ.
    Between vLLM and our model (SmolLM2-135M) gaps of 4e-5 were measured where both use float32, and of 0.19 (mean 0.05)
    where the engine uses bfloat16; wrong weights are off by far more. A `ReplicatedEngine` has every replica compared.
    """
    if isinstance(engine, ReplicatedEngine):
        return engine.verify(Proof(tuple(reference_scores), key, tuple(probes), tolerance, previous_key))
    if not probes or len(probes) != len(reference_scores) or not tolerance > 0:
        raise ValueError(
            f"a check needs probes, one reference for each and a tolerance above 0; got {len(probes)} probes, "
            f"{len(reference_scores)} references, tolerance {tolerance}"
        )
    scores = [engine.score(key, probe.prompt, probe.tokens) for probe in probes]
    gaps = [_gap(key, own, reference) for own, reference in zip(scores, reference_scores, strict=True)]
    joined = np.concatenate(gaps)
    largest, mean = float(joined.max()), float(joined.mean())
    if not largest <= tolerance:
        worst = max(range(len(gaps)), key=lambda index: float(gaps[index].max()))
        raise EngineError(
            f"the engine's log-probabilities under {key} are up to {largest:.4g} nats off the trainer's (mean "
            f"{mean:.4g}, probe {worst}, tolerance {tolerance:g}); it computes with other weights or in another "
            "precision: load the version again under a new key, and give engine and trainer the same dtype"
        )
    if previous_key is None:
        return SyncReport(largest, mean, None)
    before = [engine.score(previous_key, probe.prompt, probe.tokens) for probe in probes]
    change = max(float(np.abs(new - old).max()) for new, old in zip(scores, before, strict=True))
    if change == 0.0:
        raise EngineError(
            f"the engine's log-probabilities under {key} are exactly those under {previous_key}, although the weights "
            "differ; it still serves the old version: check that every version has a name and a folder of its own"
        )
    return SyncReport(largest, mean, change)


def _gap(key: AdapterKey, own: FloatArray, reference: FloatArray) -> FloatArray:
    if own.shape != reference.shape or own.size == 0:
        raise EngineError(
            f"the engine scored {own.shape} tokens under {key}, the trainer {reference.shape}; both must score the same"
        )
    if not (np.isfinite(own).all() and np.isfinite(reference).all()):
        raise EngineError(f"a log-probability under {key} is not finite; the adapter or the model has overflowed")
    gap: FloatArray = np.abs(own - reference)
    return gap
