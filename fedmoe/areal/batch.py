"""Training examples as flat arrays for the learner's process, and as padded rows of tensors for AReaL's actor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fedmoe.areal.config import ArealError
from fedmoe.areal.rpc import Array
from fedmoe.arena.learning.loss import AGGREGATIONS
from fedmoe.arena.rollout.episodes import Example
from fedmoe.lora.adapter import FloatArray

IntArray = NDArray[np.int32]
TensorRow = dict[str, torch.Tensor]
_Number = TypeVar("_Number", np.float32, np.int32)
_SEQUENCES = ("prompts", "tokens", "prompt_lengths", "token_lengths")


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
        return {name: getattr(self, name) for name in _SEQUENCES}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Sequences:
        """What `arrays` gave; raises `ArealError` when the lengths contradict the tokens."""
        prompts, tokens, prompt_lengths, token_lengths = (_flat(arrays, name, np.int32) for name in _SEQUENCES)
        fits = len(prompt_lengths) == len(token_lengths) > 0 and min(prompt_lengths.min(), token_lengths.min()) > 0
        if not fits or prompt_lengths.sum() != len(prompts) or token_lengths.sum() != len(tokens):
            raise ArealError("the lengths of the sequences do not fit their tokens")
        return cls(prompts, tokens, prompt_lengths, token_lengths)


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
            np.concatenate(
                [
                    _checked(example, np.full(len(example.turn.tokens), example.advantage, np.float32), "advantages")
                    for example in examples
                ]
            ),
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
        behaviour, advantages, rewards = (
            _flat(arrays, name, np.float32) for name in ("behaviour", "advantages", "rewards")
        )
        batch = cls(sequences, behaviour, advantages, rewards, _flat(arrays, "versions", np.int32))
        tokens, count = len(sequences.tokens), len(sequences)
        if {len(behaviour), len(advantages)} != {tokens} or {len(rewards), len(batch.versions)} != {count}:
            raise ArealError(f"the arrays of a batch do not fit its {count} sequences of {tokens} tokens")
        return batch


def scaled_advantages(batch: ExampleBatch, aggregation: str) -> list[FloatArray]:
    """The advantages of every sequence, scaled so that AReaL's mean over tokens is `aggregation`."""
    lengths = batch.sequences.token_lengths.tolist()
    plan = AGGREGATIONS[aggregation](lengths, max(lengths))
    parts = batch.sequences.split(batch.advantages)
    factor = sum(lengths) / plan.denominator
    return [(part * (weight * factor)).astype(np.float32) for part, weight in zip(parts, plan.weights, strict=True)]


def _checked(example: Example, values: FloatArray, what: str) -> FloatArray:
    turn = example.turn
    if values.shape != (len(turn.tokens),) or not np.isfinite(values).all():
        raise ArealError(
            f"a turn of {example.policy} has {len(turn.tokens)} tokens; its {what} must be as many finite numbers, "
            f"got shape {values.shape} with {np.count_nonzero(~np.isfinite(values))} not finite"
        )
    return np.asarray(values, np.float32)


def _flat(arrays: Mapping[str, Array], name: str, kind: type[_Number]) -> NDArray[_Number]:
    array = arrays.get(name)
    if array is None or array.ndim != 1 or array.dtype != kind:
        raise ArealError(f"a batch needs {name}, {np.dtype(kind).name} of one dimension")
    return np.asarray(array, kind)


def sequence_row(prompt: IntArray, tokens: IntArray) -> TensorRow:
    """What a forward pass needs: `input_ids` and `attention_mask`, (1, L)."""
    ids = torch.cat([torch.from_numpy(prompt.copy()), torch.from_numpy(tokens.copy())]).long()
    return {"input_ids": ids[None], "attention_mask": torch.ones(1, len(ids), dtype=torch.bool)}


def ppo_row(
    prompt: IntArray,
    tokens: IntArray,
    behaviour: FloatArray,
    advantages: FloatArray,
    proximal: torch.Tensor,
    reward: float,
    version: int,
) -> TensorRow:
    """What `ppo_update` needs, as `compute_advantages` would leave it, but with our advantages.

    Position t of `loss_mask`, `logprobs`, `prox_logp` and `advantages` is about token t + 1, so the T sampled tokens
    lie at [P - 1, L - 1). `behaviour`, `advantages`: float32 (T,). `proximal`: (1, L), as `compute_logp` gives it.
    """
    length, sampled = len(prompt) + len(tokens), slice(len(prompt) - 1, len(prompt) + len(tokens) - 1)

    def spread(values: torch.Tensor, elsewhere: float = 0.0) -> torch.Tensor:
        row = torch.full((1, length), elsewhere, dtype=values.dtype)
        row[0, sampled] = values
        return row

    mask = spread(torch.ones(len(tokens)))
    return {
        **sequence_row(prompt, tokens),
        "loss_mask": mask,
        "logprobs": spread(torch.from_numpy(behaviour.copy())),
        "prox_logp": proximal.cpu(),
        "advantages": spread(torch.from_numpy(advantages.copy())),
        "versions": spread(torch.full((len(tokens),), version, dtype=torch.int32), elsewhere=-1),
        "rewards": torch.tensor([reward]),
        # Only for AReaL's own log.
        "kl_rewards": torch.zeros(1, length),
        "tot_rewards": reward * mask,
    }
