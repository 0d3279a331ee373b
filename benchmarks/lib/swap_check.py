"""Is every answer of `bench_serve_swap.py` wholly that of the version it names? Our own model says it again, alone.

An answer is right if it has the same greedy tokens and no log-probability is further from ours than `TOLERANCE`. All
is float32, where batching and another implementation move a log-probability by less than 1e-4 (the largest gap is
reported), so that the numbers tell versions apart even where the tokens are the same. How well they do is measured
too: over all pairs of versions of a model with the same prompt, at all places up to the first token that differs, the
share of log-probabilities that are further apart than twice the tolerance. A token from the wrong version goes
unnoticed at most that seldom, and an answer has several.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fedmoe.lora.adapter import Adapter
from fedmoe.models.base import LoadedBase
from fedmoe.models.multilora import MultiLora
from fedmoe.models.sampling import SampleSpec, sample
from lib.swap_load import Answer

#: Nats.
TOLERANCE = 5e-4


@dataclass(frozen=True)
class Said:
    """Tokens as text and their log-probabilities."""

    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Verdict:
    """How many answers were compared, those that are not the named version's, the largest gap of the others in nats,
    different answers and versions among them, and the share of places that tell two versions apart."""

    checked: int
    mixed: int
    largest_gap: float
    distinct_answers: int
    versions_met: int
    places_told_apart: float


def check(base: LoadedBase, answers: Sequence[Answer], adapters: Mapping[str, Adapter], tokens: int) -> Verdict:
    """Compare with what our own model says under the version that each answer names."""
    asked: dict[tuple[str, str], set[tuple[int, ...]]] = defaultdict(set)
    for answer in answers:
        asked[answer.model, answer.digest].add(answer.prompt)
    multi = MultiLora(base.model)
    expected = {
        (model, digest, prompt): said
        for (model, digest), prompts in asked.items()
        for prompt, said in _alone(base, multi, adapters[digest], sorted(prompts), tokens)
    }
    gaps = [_gap(Said(a.tokens, a.logprobs), expected[a.model, a.digest, a.prompt]) for a in answers]
    right = [gap for gap in gaps if gap <= TOLERANCE]
    versions = len({digest for _, digest, _ in expected})
    told = _told_apart(expected)
    return Verdict(len(answers), len(gaps) - len(right), max(right, default=0.0), len(expected), versions, told)


def _alone(
    base: LoadedBase, multi: MultiLora, adapter: Adapter, prompts: Sequence[tuple[int, ...]], tokens: int
) -> Iterator[tuple[tuple[int, ...], Said]]:
    """What one version says to each prompt."""
    wanted = [SampleSpec("only", prompt, tokens, 0.0, 0) for prompt in prompts]
    multi.add("only", adapter)
    samples = sample(base.model, multi, wanted, frozenset({base.tokenizer.eos_token_id}))
    multi.remove("only")
    for prompt, found in zip(prompts, samples, strict=True):
        shown = [base.tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in found.tokens]
        yield prompt, Said(tuple(map(str, shown)), tuple(found.logprobs.tolist()))


def _gap(said: Said, expected: Said) -> float:
    """The largest difference of a log-probability, infinite where the tokens differ."""
    if said.tokens != expected.tokens or len(said.logprobs) != len(expected.logprobs):
        return float("inf")
    return float(np.abs(np.subtract(said.logprobs, expected.logprobs)).max())


def _told_apart(expected: Mapping[tuple[str, str, tuple[int, ...]], Said]) -> float:
    """The share of places with equal text before them whose log-probabilities differ by more than rounding can."""
    groups: dict[tuple[str, tuple[int, ...]], list[Said]] = defaultdict(list)
    for (model, _, prompt), said in expected.items():
        groups[model, prompt].append(said)
    apart = [
        said != other or abs(one - two) > 2 * TOLERANCE
        for group in groups.values()
        for first, second in combinations(group, 2)
        for said, other, one, two in _shared(first, second)
    ]
    return float(np.mean(apart)) if apart else 0.0


def _shared(first: Said, second: Said) -> Iterator[tuple[str, str, float, float]]:
    """Both tokens and log-probabilities at every place up to the first that differs."""
    for place in zip(first.tokens, second.tokens, first.logprobs, second.logprobs, strict=False):
        yield place
        if place[0] != place[1]:
            return
