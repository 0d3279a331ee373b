"""Checks that a model computes each of several packed sequences as if it were alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedmoe.areal.config import ArealError
from fedmoe.lora.adapter import FloatArray

#: Differences of log-probabilities beyond this are no rounding (nats); leaks that were measured are 0.17 to 2.3.
TOLERANCE = 1e-3
_LENGTHS = (24, 17, 9)
_PREFIX = 11

#: Token ids of several sequences -> for each the log-probability of every token but its first, float32 (L - 1,).
Score = Callable[[Sequence[Sequence[int]]], Sequence[FloatArray]]


class LeakError(ArealError):
    """Tokens that see what they must not."""


def check_isolation(score: Score, vocabulary: int) -> None:
    """Refuse a model whose packed sequences see each other or whose tokens see later ones, with LeakError."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, vocabulary, length).tolist() for length in _LENGTHS]
    together = score(sequences)
    for place, sequence in enumerate(sequences):
        gap = _gap(together[place], score([sequence])[0])
        if not gap <= TOLERANCE:
            raise LeakError(
                f"packed sequences see each other: the log-probabilities of sequence {place} differ by {gap:.3g} nats "
                f"from those it has alone (at most {TOLERANCE}); set tokens_per_micro_batch to None, and check that "
                "this version of AReaL builds its attention masks as fedmoe.areal.actor expects"
            )
    longest = sequences[0]
    gap = _gap(score([longest])[0][: _PREFIX - 1], score([longest[:_PREFIX]])[0])
    if not gap <= TOLERANCE:
        raise LeakError(
            f"tokens see later ones: the log-probabilities of a prefix change by {gap:.3g} nats with what follows it "
            f"(at most {TOLERANCE}); the attention has lost its causal mask"
        )


def _gap(values: FloatArray, others: FloatArray) -> float:
    if values.shape != others.shape:
        raise LeakError(f"a sequence has {others.shape} log-probabilities alone and {values.shape} among others")
    return float(np.abs(values - others).max(initial=0.0))
