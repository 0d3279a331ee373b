"""Many samples to tokens, in several processes where that pays, with an account of what did not become tokens."""

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
from fedmoe.datasets.readers.lines import DataError
from fedmoe.datasets.tokens.chat_template import TemplateRefusalError
from fedmoe.datasets.tokens.long_samples import LongRows, fit
from fedmoe.datasets.tokens.render import render
from fedmoe.datasets.tokens.tokenized import MASKED, TokenizedSample, Tokenizer

#: Fewer samples than this are done before further processes have loaded their libraries.
PARALLEL_FROM = 4096
_CHUNK = 256
# Chunks in the hands of each process: one at work, one waiting.
_AHEAD = 2

#: Told from time to time how many samples are done.
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A sample that the chat template refuses, by its number among the samples."""

    number: int
    reason: str


@dataclass(eq=False)
class Tokenized:
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
    refused: list[Refusal] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    given: int = 0

    def extend(self, later: Tokenized) -> None:
        """Append what later samples became."""
        self.samples += later.samples
        self.row_of += [self.given + number for number in later.row_of]
        self.lengths += later.lengths
        self.refused += [Refusal(self.given + one.number, one.reason) for one in later.refused]
        self.empty += [self.given + number for number in later.empty]
        self.too_long += [self.given + number for number in later.too_long]
        self.counts.update(later.counts)
        self.notes.update(later.notes)
        self.given += later.given


def tokenize_samples(
    samples: Iterable[Sample],
    tokenizer: Tokenizer,
    max_length: int,
    long_rows: LongRows = "truncate",
    processes: int = 1,
    progress: Progress = lambda done: None,
) -> Tokenized:
    """All samples as tokens, none longer than `max_length`; the same for any number of `processes`.

    Raises `DataError` where the tokenizer lacks what all samples need (an end token, a chat template).
    """
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, got {max_length}")
    rest = iter(samples)
    first = list(islice(rest, PARALLEL_FROM))
    chunks = _chunks(chain(first, rest))
    if processes > 1 and len(first) == PARALLEL_FROM:
        parts = _in_processes(chunks, _Work(tokenizer, max_length, long_rows), processes)
    else:
        parts = map(_Work(tokenizer, max_length, long_rows), chunks)
    total = Tokenized()
    for part in parts:
        total.extend(part)
        progress(total.given)
    return total


def _chunks(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    while chunk := list(islice(samples, _CHUNK)):
        yield chunk


@dataclass(frozen=True)
class _Work:
    """Renders and fits chunks of samples."""

    tokenizer: Tokenizer
    max_length: int
    long_rows: LongRows

    def __call__(self, chunk: list[Sample]) -> Tokenized:
        found = Tokenized(given=len(chunk))
        end_marks = _end_marks(self.tokenizer)
        for number, sample in enumerate(chunk):
            try:
                rendering = render(sample, self.tokenizer)
            except TemplateRefusalError as error:
                found.refused.append(Refusal(number, str(error)))
                continue
            found.notes.update(rendering.notes)
            found.lengths.append(max(len(whole.input_ids) for whole in rendering.samples))
            if isinstance(sample, Chat):
                found.counts["endless"] += any(_last_learned(whole) not in end_marks for whole in rendering.samples)
            self._fit(number, isinstance(sample, Text), rendering.samples, found)
        return found

    def _fit(self, number: int, running_text: bool, wholes: Iterable[TokenizedSample], found: Tokenized) -> None:
        learned = sum(whole.learned for whole in wholes)
        fitted = [fit(whole, self.max_length, self.long_rows, running_text) for whole in wholes]
        pieces = [piece for one in fitted for piece in one.pieces]
        lost = sum(one.lost for one in fitted)
        found.samples += pieces
        found.row_of += [number] * len(pieces)
        if not learned:
            found.empty.append(number)
        elif not pieces:
            found.too_long.append(number)
        else:
            found.counts["lost"] += lost
            found.counts["cut"] += lost > 0
            found.counts["split"] += any(len(one.pieces) > 1 for one in fitted)


def _last_learned(sample: TokenizedSample) -> int:
    learned = np.flatnonzero(sample.labels != MASKED)
    return int(sample.labels[learned[-1]]) if learned.size else MASKED


class _HasSpecialTokens(Protocol):
    @property
    def all_special_ids(self) -> list[int]: ...
    @property
    def added_tokens_decoder(self) -> Mapping[int, object]: ...


def _end_marks(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that can end an answer: those that no plain text is made of."""
    known = cast(_HasSpecialTokens, tokenizer)
    return frozenset((*known.all_special_ids, *known.added_tokens_decoder, MASKED))


_work: _Work | None = None


def _start_process(work: _Work) -> None:
    global _work
    _work = work


def _run_chunk(chunk: list[Sample]) -> Tokenized:
    assert _work is not None
    return _work(chunk)


def _in_processes(chunks: Iterator[list[Sample]], work: _Work, processes: int) -> Iterator[Tokenized]:
    """What the chunks become, in their order; only a few are read ahead."""
    # Not forked: the threads of numerical libraries do not survive that.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start_process, (work,)) as pool:
        waiting: deque[Future[Tokenized]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(_run_chunk, chunk))
            if len(waiting) >= _AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
