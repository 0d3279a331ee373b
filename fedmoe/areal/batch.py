"""Training examples as flat arrays for the learner's process; advantages scaled to the loss aggregation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from fedmoe.areal.config import ArealError
from fedmoe.areal.rpc import Array
from fedmoe.arena.learning.loss import AGGREGATIONS
from fedmoe.arena.rollout.episodes import Example
from fedmoe.lora.adapter import FloatArray

IntArray = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Sequences:
    """N prompts with what followed, flat: `prompts` (sum of P), `tokens` (sum of T), and the lengths P and T (N,)."""

    prompts: IntArray
    tokens: IntArray
    prompt_lengths: IntArray
    token_lengths: IntArray

    @classmethod
    def of(cls, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Sequences:
        """From (prompt, tokens) pairs; neither may be empty: the first token needs something before it."""
        if not pairs:
            raise ArealError("there is no sequence; at least one is needed")
        for place, (prompt, tokens) in enumerate(pairs):
            if not prompt or not tokens:
                raise ArealError(
                    f"neither prompt nor answer may be empty; number {place} has {len(prompt)} and {len(tokens)} tokens"
                )
        return cls(
            np.fromiter((token for prompt, _ in pairs for token in prompt), np.int32),
            np.fromiter((token for _, tokens in pairs for token in tokens), np.int32),
            np.array([len(prompt) for prompt, _ in pairs], np.int32),
            np.array([len(tokens) for _, tokens in pairs], np.int32),
        )

    def __len__(self) -> int:
        return len(self.token_lengths)

    def __iter__(self) -> Iterator[tuple[IntArray, IntArray]]:
        """Each prompt (P,) with its tokens (T,)."""
        prompts = np.split(self.prompts, np.cumsum(self.prompt_lengths)[:-1])
        yield from zip(prompts, np.split(self.tokens, np.cumsum(self.token_lengths)[:-1]), strict=True)

    def split(self, values: FloatArray) -> list[FloatArray]:
        """Flat values of sampled tokens (sum of T) as one array a sequence."""
        return [np.asarray(part, np.float32) for part in np.split(values, np.cumsum(self.token_lengths)[:-1])]

    def arrays(self) -> dict[str, Array]:
        """The arrays by name, as a frame carries them."""
        names = ("prompts", "tokens", "prompt_lengths", "token_lengths")
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Sequences:
        """What `arrays` gave; raises `ArealError` when the lengths contradict the tokens."""
        prompts, tokens, prompt_lengths, token_lengths = (
            _integers(arrays, name) for name in ("prompts", "tokens", "prompt_lengths", "token_lengths")
        )
        sequences = cls(prompts, tokens, prompt_lengths, token_lengths)
        fits = len(prompt_lengths) == len(token_lengths) > 0 and min(prompt_lengths.min(), token_lengths.min()) > 0
        if not fits or prompt_lengths.sum() != len(prompts) or token_lengths.sum() != len(tokens):
            raise ArealError("the lengths of the sequences do not fit their tokens")
        return sequences


@dataclass(frozen=True, slots=True, eq=False)
class ExampleBatch:
    """The examples of one update. `behaviour`, `advantages`: float32 (sum of T). `rewards`, `versions`: (N,)."""

    sequences: Sequences
    behaviour: FloatArray
    advantages: FloatArray
    rewards: FloatArray
    versions: IntArray

    @classmethod
    def of(cls, examples: Sequence[Example]) -> ExampleBatch:
        """From examples."""
        sequences = Sequences.of([(example.turn.prompt, example.turn.tokens) for example in examples])
        return cls(
            sequences,
            np.concatenate([_checked(example, example.turn.behaviour, "log-probabilities") for example in examples]),
            np.concatenate([_checked(example, _advantages(example), "advantages") for example in examples]),
            np.array([example.reward for example in examples], np.float32),
            np.array([example.turn.version for example in examples], np.int32),
        )

    def arrays(self) -> dict[str, Array]:
        """The arrays by name, as a frame carries them."""
        own: dict[str, Array] = {"behaviour": self.behaviour, "advantages": self.advantages, "rewards": self.rewards}
        return {**self.sequences.arrays(), **own, "versions": self.versions}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> ExampleBatch:
        """What `arrays` gave; raises `ArealError` for arrays that do not fit together."""
        sequences = Sequences.from_arrays(arrays)
        behaviour, advantages, rewards = (_floats(arrays, name) for name in ("behaviour", "advantages", "rewards"))
        batch = cls(sequences, behaviour, advantages, rewards, _integers(arrays, "versions"))
        tokens, count = len(sequences.tokens), len(sequences)
        if {len(behaviour), len(advantages)} != {tokens} or {len(rewards), len(batch.versions)} != {count}:
            raise ArealError(f"the arrays of a batch do not fit its {count} sequences of {tokens} tokens")
        return batch


def scaled_advantages(batch: ExampleBatch, start: int, stop: int, aggregation: str) -> list[FloatArray]:
    """The advantages of sequences [start, stop), scaled so that AReaL's mean over tokens is `aggregation`."""
    lengths = [int(length) for length in batch.sequences.token_lengths[start:stop]]
    plan = AGGREGATIONS[aggregation](lengths, max(lengths))
    parts = batch.sequences.split(batch.advantages)[start:stop]
    factor = sum(lengths) / plan.denominator
    return [(part * (weight * factor)).astype(np.float32) for part, weight in zip(parts, plan.weights, strict=True)]


def minibatch_bounds(count: int, minibatches: int) -> list[tuple[int, int]]:
    """Where `count` examples are cut into at most `minibatches` parts of nearly equal size, in order."""
    parts = min(count, minibatches)
    edges = [count * part // parts for part in range(parts + 1)]
    return list(pairwise(edges))


def _advantages(example: Example) -> FloatArray:
    return np.full(len(example.turn.tokens), example.advantage, np.float32)


def _checked(example: Example, values: FloatArray, what: str) -> FloatArray:
    turn = example.turn
    if values.shape != (len(turn.tokens),) or not np.isfinite(values).all():
        raise ArealError(
            f"a turn of {example.policy} has {len(turn.tokens)} tokens; its {what} must be as many finite numbers, "
            f"got shape {values.shape} with {np.count_nonzero(~np.isfinite(values))} not finite"
        )
    return np.asarray(values, np.float32)


def _floats(arrays: Mapping[str, Array], name: str) -> FloatArray:
    return np.asarray(_flat(arrays, name, np.dtype(np.float32)), np.float32)


def _integers(arrays: Mapping[str, Array], name: str) -> IntArray:
    return np.asarray(_flat(arrays, name, np.dtype(np.int32)), np.int32)


def _flat(arrays: Mapping[str, Array], name: str, dtype: np.dtype[np.generic]) -> Array:
    array = arrays.get(name)
    if array is None or array.ndim != 1 or array.dtype != dtype:
        raise ArealError(f"a batch needs {name}, {dtype.name} of one dimension")
    return array
