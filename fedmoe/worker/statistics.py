"""Statistics of a worker's data for merging and routing: computed and cached; `disclosure` has them sent.

Disclosed are: of the prompts, in two halves, how many samples there were, the mean of their features on the base
model (hidden states after up to four numbers of layers, d numbers in all), and of their covariance the 64 main
directions and the diagonal of what is left (at most 66 d numbers a half); of the inputs of the adapted modules how many
tokens, and, each input weighted by the squared gradient of the loss, the mean of their squares and a random sketch of
their second moment ((q + 1) n numbers a module, q = 64). No text, no token and no single prompt's features: every
number is taken over at least half of `LEAST_PROMPTS` samples. That is no anonymity: the numbers tell what the data are
about, whoever has a guess of a text can test whether it was likely among so few, and no noise is added. All of it is
made on the public base model from a sample that is bounded in tokens and never in time, so it is made once, does not
follow the training, and is the same on a fast and on a busy machine.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from fedmoe import __version__
from fedmoe.datasets.tokens.packing import Block, collate
from fedmoe.datasets.tokens.tokenized_sample import MASKED, Int64Array
from fedmoe.lora.adapter import FloatMatrix
from fedmoe.lora.moments import InputMoments
from fedmoe.lora.prompt_statistics import PromptStatistics
from fedmoe.models.base import LoadedBase
from fedmoe.models.chat_frame import ChatFrame
from fedmoe.models.input_moments import MomentsCollector
from fedmoe.models.prompt_features import prefix_features
from fedmoe.runtime.files import write_atomic
from fedmoe.wire.contract.messages import StatisticsKind

#: Fewer samples than this say too much about each of them, and too little about the domain.
LEAST_PROMPTS = 16
#: Beginnings of a text that stand for prompts, in tokens; short ones are vaguer, and a router has to know that.
PROMPT_LENGTHS = (8, 16, 32, 64, 128)
#: The longest prompt, in tokens, that is used whole.
LONGEST_PROMPT = 256
# Samples of one part of the pass.
_SAMPLES_AT_ONCE = 16
# As many tokens of prompts cost about as much as one of moments (SmolLM2).
_PROMPT_TOKENS_A_TOKEN = 10
_KINDS: tuple[StatisticsKind, ...] = ("prompts", "moments")
_log = structlog.get_logger("fedmoe.worker")

#: Tokens of a sample, and how many of the first are a prompt, rising.
Prompt = tuple[Sequence[int], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class DataStatistics:
    """What one worker discloses; as bytes: `prompts` some MB at most, `moments` about as many as the expert.

    `samples` and `tokens` are what the data hold, of which the statistics rest on `prompts.count` and `moments.tokens`.
    """

    prompts: PromptStatistics
    moments: InputMoments
    samples: int
    tokens: int

    def to_bytes(self) -> dict[StatisticsKind, bytes]:
        """Kind of statistic -> safetensors."""
        return {"prompts": self.prompts.to_bytes(), "moments": self.moments.to_bytes()}


@dataclass(frozen=True, slots=True)
class StatisticsBudget:
    """At most about so many tokens for prompts, which a quarter of the layers are run for, and for moments.

    Tokens of moments are measured, a budget of prompts lies between two that are (about 250 texts beside 96 and 500);
    see `benchmarks/README.md`. A token of moments costs about ten of prompts.
    """

    prompt_tokens: int = 32_000
    tokens: int = 2_048


class StatisticsPass:
    """The statistics of packed training blocks, made in small parts: between two training steps, for example.

    Blocks are taken in order until the budget is used up; `pack` has shuffled them. `LEAST_PROMPTS` prompts and one
    block are used, however small the budget. `progress` gets the tokens done so far and their final number. Make it on
    a bare base model, before an adapter is attached; each `advance` needs the base to compute as if it were bare.
    Raises ValueError for blocks with fewer samples.
    """

    def __init__(
        self,
        base: LoadedBase,
        blocks: Sequence[Block],
        targets: Sequence[str] | str,
        budget: StatisticsBudget | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self._allowed = budget or StatisticsBudget()
        self._base, self._progress = base, progress
        self._samples = sum(1 for _ in _samples(blocks))
        self._tokens = sum(map(_moment_tokens, blocks))
        self._of_moments = min(self._tokens, self._allowed.tokens)
        self._prompts = sample_prompts(base, blocks, self._allowed.prompt_tokens)
        self._collector = MomentsCollector(base, targets)
        self._features: list[FloatMatrix] = []
        self._parts = itertools.chain(self._parts_of_moments(blocks), self._parts_of_prompts())
        self._done = 0
        #: Whether all of it is done.
        self.finished = False

    def advance(self, tokens: float) -> None:
        """Go on for as long as about so many tokens of moments take, a block or some prompts at least."""
        while tokens > 0:
            cost = next(self._parts, None)
            if cost is None:
                self.finished = True
                return
            tokens -= cost

    def statistics(self) -> DataStatistics:
        """What was made, once it is finished."""
        prompts = _of_features(self._features, self._prompts)
        return DataStatistics(prompts, self._collector.moments(), self._samples, self._tokens)

    def _parts_of_moments(self, blocks: Sequence[Block]) -> Iterator[float]:
        """What each part cost, in tokens of moments."""
        used = 0
        for block in blocks:
            tokens = _moment_tokens(block)
            with self._collector as collector:
                collector.add(collate([block]))
            used += tokens
            self._tell(min(used, self._of_moments))
            yield tokens
            if used >= self._allowed.tokens:
                break
        self._done = self._of_moments

    def _parts_of_prompts(self) -> Iterator[float]:
        for features, tokens in _feature_parts(self._base, self._prompts):
            self._features.append(features)
            self._done += tokens
            self._tell(self._done)
            yield tokens / _PROMPT_TOKENS_A_TOKEN

    def _tell(self, done: int) -> None:
        self._progress(done, self._of_moments + sum(lengths[-1] for _, lengths in self._prompts))


def data_statistics(
    base: LoadedBase,
    blocks: Sequence[Block],
    targets: Sequence[str] | str,
    budget: StatisticsBudget | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DataStatistics:
    """The statistics of packed training blocks on a bare base model, all at once; see `StatisticsPass`."""
    made = StatisticsPass(base, blocks, targets, budget, progress)
    made.advance(math.inf)
    return made.statistics()


def prompt_statistics(base: LoadedBase, chosen: Sequence[Prompt]) -> PromptStatistics:
    """The statistics of prompts."""
    return _of_features([features for features, _ in _feature_parts(base, chosen)], chosen)


def _feature_parts(base: LoadedBase, chosen: Sequence[Prompt]) -> Iterator[tuple[FloatMatrix, int]]:
    """Features of some prompts after each other, and how many tokens these have."""
    for start in range(0, len(chosen), _SAMPLES_AT_ONCE):
        ids, lengths = zip(*chosen[start : start + _SAMPLES_AT_ONCE], strict=True)
        yield prefix_features(base, ids, lengths), sum(prefixes[-1] for prefixes in lengths)


def _of_features(parts: Sequence[FloatMatrix], chosen: Sequence[Prompt]) -> PromptStatistics:
    of_row = [sample for sample, (_, prefixes) in enumerate(chosen) for _ in prefixes]
    return PromptStatistics.of(np.concatenate(parts), of_row)


def _moment_tokens(block: Block) -> int:
    """Tokens that moments are made of: none of a block without a label, which has no gradient."""
    return int(np.count_nonzero(block.segment_ids >= 0)) if (block.labels != MASKED).any() else 0


def sample_prompts(base: LoadedBase, blocks: Sequence[Block], tokens: int) -> list[Prompt]:
    """The prompts in `blocks`: until about `tokens` tokens are used, but not fewer than `LEAST_PROMPTS`.

    A sample whose beginning carries no loss (a question with its answer) gives that beginning, up to `LONGEST_PROMPT`
    tokens and without the chat template's frame. Other samples (running text) give their first `PROMPT_LENGTHS` tokens,
    all out of one pass. Raises ValueError where there are not `LEAST_PROMPTS` samples of at least two tokens.
    """
    chosen: list[Prompt] = []
    frame = ChatFrame.of(base.tokenizer)
    used = 0
    for ids, labels in _samples(blocks):
        if used >= tokens and len(chosen) >= LEAST_PROMPTS:
            break
        prompt, lengths = _prompts(ids, labels, frame)
        if lengths:
            chosen.append((prompt, lengths))
            used += lengths[-1]
    if len(chosen) < LEAST_PROMPTS:
        raise ValueError(
            f"statistics are made of at least {LEAST_PROMPTS} samples of two tokens or more, there are {len(chosen)}; "
            "give the worker more data, or let it send none"
        )
    return chosen


def _samples(blocks: Sequence[Block]) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Tokens and labels of every sample, in the blocks' order."""
    for block in blocks:
        for segment in range(int(block.segment_ids.max()) + 1):
            inside = block.segment_ids == segment
            yield block.input_ids[inside], block.labels[inside]


def _prompts(ids: Int64Array, labels: Int64Array, frame: ChatFrame) -> tuple[Sequence[int], tuple[int, ...]]:
    """A sample's tokens, and how many of the first are a prompt, rising; no number for a sample that is too short."""
    learned = np.flatnonzero(labels != MASKED)
    # The first token never carries loss, so in running text the second is the first that does.
    beginning = int(learned[0]) if learned.size else len(labels)
    if beginning > 1:
        prompt = frame.removed(ids[:beginning].tolist())[:LONGEST_PROMPT]
        return prompt, (len(prompt),)
    lengths = tuple(length for length in PROMPT_LENGTHS if length <= len(labels))
    return ids.tolist(), lengths or ((len(labels),) if len(labels) > 1 else ())


def statistics_key(base: LoadedBase, blocks: Sequence[Block], targets: Sequence[str] | str) -> str:
    """A hash of all that statistics follow from: base model and its precision, data, adapted modules, and this code."""
    made_of = [__version__, base.identity.weights_hash, str(base.dtype), targets]
    key = hashlib.sha256(json.dumps(made_of).encode())
    for block in blocks:
        for array in (block.input_ids, block.labels, block.segment_ids):
            key.update(array.tobytes())
    return key.hexdigest()[:32]


def read_cached(folder: Path, key: str) -> dict[StatisticsKind, bytes]:
    """The statistics cached under this key, by kind; empty unless all are there, can be read and are undamaged."""
    bodies: dict[StatisticsKind, bytes] = {}
    for kind in _KINDS:
        for file in folder.glob(f"{kind}-{key}-*.safetensors"):
            try:
                body = file.read_bytes()
            except OSError as error:
                _log.warning("kept_statistics_unreadable", file=str(file), reason=str(error))
                continue
            if file.name == _name(kind, key, body):
                bodies[kind] = body
            else:
                _log.warning("kept_statistics_damaged", file=str(file))
    return bodies if len(bodies) == len(_KINDS) else {}


def write_cached(folder: Path, key: str, bodies: Mapping[StatisticsKind, bytes]) -> None:
    """Cache these and no others; a disk that takes none is logged, since training does not need them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        for kind, body in bodies.items():
            write_atomic(folder / _name(kind, key, body), body)
    except OSError as error:
        _log.warning("statistics_not_kept", reason=str(error))


def _name(kind: StatisticsKind, key: str, body: bytes) -> str:
    return f"{kind}-{key}-{hashlib.sha256(body).hexdigest()[:32]}.safetensors"
