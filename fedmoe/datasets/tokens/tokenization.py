"""Tokenises samples, in several processes where that is faster, and counts samples left out or cut."""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Protocol, cast

import numpy as np

from fedmoe.datasets.formats.samples import Chat, Sample, Text
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.chat_template import TemplateRefusalError
from fedmoe.datasets.tokens.long_samples import LongRowPolicy, fit
from fedmoe.datasets.tokens.render import render
from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample, Tokenizer

#: Fewer samples than this are done before further processes have loaded their libraries.
PARALLEL_FROM = 4096
_CHUNK = 256
# Chunks in the hands of each process: one at work, one waiting.
_AHEAD = 2


@dataclass(frozen=True, slots=True)
class RefusedSample:
    """A sample that the chat template refuses, by its number among the samples."""

    number: int
    reason: str


@dataclass(eq=False)
class TokenData:
    """The samples fit to train on, and what became of the others; numbers count the samples given, from 0.

    `row_of[i]` is the number of the sample that tokens `i` are of; `lengths` are the full lengths in tokens of all
    that can be rendered. `too_long` are left out since no part of an answer fits, `empty` have no token to learn.
    `counts`: samples `cut` (lost the tail of an answer), `split` (in several pieces), `endless` (an answer ends
    without an end mark), and learned tokens `lost` with what was cut. `notes` say what a chat template left out, and
    of how many.
    """

    samples: list[TokenizedSample] = field(default_factory=list)
    row_of: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    refused: list[RefusedSample] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    given: int = 0

    def extend(self, later: TokenData) -> None:
        """Append what later samples became."""
        self.samples += later.samples
        self.row_of += [self.given + number for number in later.row_of]
        self.lengths += later.lengths
        self.refused += [RefusedSample(self.given + refusal.number, refusal.reason) for refusal in later.refused]
        self.empty += [self.given + number for number in later.empty]
        self.too_long += [self.given + number for number in later.too_long]
        self.counts.update(later.counts)
        self.notes.update(later.notes)
        self.given += later.given


def tokenize_samples(
    samples: Iterable[Sample],
    tokenizer: Tokenizer,
    max_length: int,
    long_rows: LongRowPolicy = "truncate",
    processes: int = 1,
    progress: Callable[[int], None] = lambda done: None,
) -> TokenData:
    """All samples as tokens, none longer than `max_length`; the same for any number of `processes`.

    `progress` is called from time to time with the number of samples done. Raises `DataError` where the tokenizer
    lacks what all samples need (an end token, a chat template).
    """
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, got {max_length}")
    rest = iter(samples)
    first = list(islice(rest, PARALLEL_FROM))
    rest = chain(first, rest)
    chunks = iter(lambda: list(islice(rest, _CHUNK)), [])
    work = _ChunkTokenizer(tokenizer, max_length, long_rows)
    parallel = processes > 1 and len(first) == PARALLEL_FROM
    parts = _in_processes(chunks, work, processes) if parallel else map(work, chunks)
    total = TokenData()
    for part in parts:
        total.extend(part)
        progress(total.given)
    return total


@dataclass(frozen=True)
class _ChunkTokenizer:
    """Renders and fits chunks of samples."""

    tokenizer: Tokenizer
    max_length: int
    long_rows: LongRowPolicy

    def __call__(self, chunk: list[Sample]) -> TokenData:
        data = TokenData(given=len(chunk))
        special = cast(_HasSpecialTokens, self.tokenizer)
        # Tokens that can end an answer: those that no plain text is made of.
        end_marks = {*special.all_special_ids, *special.added_tokens_decoder, MASKED}
        for number, sample in enumerate(chunk):
            try:
                rendering = render(sample, self.tokenizer)
            except TemplateRefusalError as error:
                data.refused.append(RefusedSample(number, str(error)))
                continue
            data.notes.update(rendering.notes)
            data.lengths.append(max(len(whole.input_ids) for whole in rendering.samples))
            if isinstance(sample, Chat):
                data.counts["endless"] += any(_last_learned(whole) not in end_marks for whole in rendering.samples)
            self._fit(number, isinstance(sample, Text), rendering.samples, data)
        return data

    def _fit(self, number: int, running_text: bool, wholes: Iterable[TokenizedSample], data: TokenData) -> None:
        learned = sum(whole.learned for whole in wholes)
        fitted = [fit(whole, self.max_length, self.long_rows, running_text) for whole in wholes]
        pieces = [piece for parts in fitted for piece in parts.pieces]
        lost = sum(parts.lost for parts in fitted)
        data.samples += pieces
        data.row_of += [number] * len(pieces)
        if not learned:
            data.empty.append(number)
        elif not pieces:
            data.too_long.append(number)
        else:
            data.counts["lost"] += lost
            data.counts["cut"] += lost > 0
            data.counts["split"] += any(len(parts.pieces) > 1 for parts in fitted)


def _last_learned(sample: TokenizedSample) -> int:
    learned = np.flatnonzero(sample.labels != MASKED)
    return int(sample.labels[learned[-1]]) if learned.size else MASKED


class _HasSpecialTokens(Protocol):
    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, object]: ...


_work: _ChunkTokenizer | None = None


def _start_process(work: _ChunkTokenizer) -> None:
    global _work
    _work = work


def _run_chunk(chunk: list[Sample]) -> TokenData:
    assert _work is not None
    return _work(chunk)


def _in_processes(chunks: Iterator[list[Sample]], work: _ChunkTokenizer, processes: int) -> Iterator[TokenData]:
    """What the chunks become, in their order; only a few are read ahead."""
    # Not forked: the threads of numerical libraries do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (work,)) as pool:
        waiting: deque[Future[TokenData]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_run_chunk, chunk))
            if len(waiting) >= _AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
