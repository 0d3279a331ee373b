"""Tokenises samples, fits them to the maximum length, and counts those that were left out, cut or split."""

from __future__ import annotations

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from operator import attrgetter
from typing import Literal, get_args

import numpy as np

from fedmoe.datasets.formats.samples import Chat, Sample, Text
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.chat_answers import TemplateRefusalError
from fedmoe.datasets.tokens.render import render_all
from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample, Tokenizer

#: Fewer samples than this are done before further processes have loaded their libraries.
PARALLEL_FROM = 4096
_CHUNK = 256
# Chunks in the hands of each process: one at work, one waiting.
_AHEAD = 2
#: What becomes of a prompt with an answer that does not fit: the answer's tail goes, or further samples repeat the
#: prompt, or the row is left out. Running text is split in every case.
LongRowPolicy = Literal["truncate", "split", "drop"]
LONG_ROW_POLICIES: tuple[LongRowPolicy, ...] = get_args(LongRowPolicy)
# The part of an answer's room that repeats the text before it, so that no loss falls on the seam.
_OVERLAP = 8


@dataclass(eq=False)
class TokenData:
    """The samples fit to train on, and what became of the others; numbers count the samples read, from 0.

    `row_of[i]` is the number of the sample that tokens `i` are of; `lengths` are the full lengths in tokens of all
    that can be rendered. `refused` are those that the chat template refuses, and why. `too_long` are left out since
    no part of an answer fits, `empty` have no token to learn. `counts`: samples `cut` (lost the tail of an answer),
    `split` (in several pieces), `endless` (an answer ends without an end mark), and learned tokens `lost` with what
    was cut. `notes` say what a chat template left out, and of how many.
    """

    samples: list[TokenizedSample] = field(default_factory=list)
    row_of: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    refused: list[tuple[int, str]] = field(default_factory=list)
    empty: list[int] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    sample_count: int = 0

    def extend(self, later: TokenData) -> None:
        """Append what later samples became."""
        self.samples += later.samples
        self.row_of += [self.sample_count + number for number in later.row_of]
        self.lengths += later.lengths
        self.refused += [(self.sample_count + number, reason) for number, reason in later.refused]
        self.empty += [self.sample_count + number for number in later.empty]
        self.too_long += [self.sample_count + number for number in later.too_long]
        self.counts.update(later.counts)
        self.notes.update(later.notes)
        self.sample_count += later.sample_count


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
    lacks what all samples need (an end token, a chat template), or one of the processes is ended from outside.
    """
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, got {max_length}")
    rest = iter(samples)
    first = list(islice(rest, PARALLEL_FROM))
    rest = chain(first, rest)
    chunks = iter(lambda: list(islice(rest, _CHUNK)), [])
    work = partial(_tokenize_chunk, tokenizer, max_length, long_rows)
    parallel = processes > 1 and len(first) == PARALLEL_FROM
    parts = _in_processes(chunks, work, processes) if parallel else map(work, chunks)
    total = TokenData()
    for part in parts:
        total.extend(part)
        progress(total.sample_count)
    return total


def _tokenize_chunk(tokenizer: Tokenizer, max_length: int, long_rows: LongRowPolicy, chunk: list[Sample]) -> TokenData:
    data = TokenData(sample_count=len(chunk))
    # Tokens that can end an answer: those that no plain text is made of.
    special, added = attrgetter("all_special_ids", "added_tokens_decoder")(tokenizer)
    end_marks = {*special, *added}
    for number, (sample, rendering) in enumerate(zip(chunk, render_all(chunk, tokenizer), strict=True)):
        if isinstance(rendering, TemplateRefusalError):
            data.refused.append((number, str(rendering)))
            continue
        data.notes.update(rendering.notes)
        data.lengths.append(max(len(whole.input_ids) for whole in rendering.samples))
        if isinstance(sample, Chat):
            last = (whole.labels[whole.labels != MASKED][-1:].tolist() for whole in rendering.samples)
            data.counts["endless"] += not end_marks.issuperset(chain.from_iterable(last))
        is_text = isinstance(sample, Text)
        fitted = [fit(whole, max_length, long_rows, is_text) for whole in rendering.samples]
        pieces = [piece for parts in fitted for piece in parts.pieces]
        lost = sum(parts.lost for parts in fitted)
        data.samples += pieces
        data.row_of += [number] * len(pieces)
        if not any(whole.learned for whole in rendering.samples):
            data.empty.append(number)
        elif not pieces:
            data.too_long.append(number)
        else:
            data.counts["lost"] += lost
            data.counts["cut"] += lost > 0
            data.counts["split"] += any(len(parts.pieces) > 1 for parts in fitted)
    return data


_Work = Callable[[list[Sample]], TokenData]
_work: _Work | None = None


def _start_process(work: _Work) -> None:
    global _work
    _work = work


def _run_chunk(chunk: list[Sample]) -> TokenData:
    assert _work is not None
    return _work(chunk)


def _in_processes(chunks: Iterator[list[Sample]], work: _Work, processes: int) -> Iterator[TokenData]:
    """What the chunks become, in their order; only a few are read ahead."""
    # Not forked: the threads of numerical libraries do not survive that.
    context = multiprocessing.get_context("spawn")
    waiting: deque[Future[TokenData]] = deque()
    try:
        with ProcessPoolExecutor(processes, context, _start_process, (work,)) as pool:
            for chunk in chunks:
                waiting.append(pool.submit(_run_chunk, chunk))
                if len(waiting) >= _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {processes} processes that make tokens was ended from outside, often for want of memory; start "
            "again, with OMP_NUM_THREADS=1 in a single process"
        ) from error


@dataclass(frozen=True, slots=True)
class SamplePieces:
    """What of a sample fits, in pieces of at most `max_length` tokens, and how many learned tokens are lost."""

    pieces: tuple[TokenizedSample, ...]
    lost: int = 0


def fit(sample: TokenizedSample, max_length: int, long_rows: LongRowPolicy, running_text: bool) -> SamplePieces:
    """The sample itself if it fits; else pieces of it, none where nothing of it can be learned."""
    length = len(sample.input_ids)
    if length <= max_length:
        return SamplePieces((sample,) if sample.learned else ())
    if running_text:
        pieces = [_cut(sample, start, start + max_length) for start in range(0, length, max_length)]
        return SamplePieces(tuple(piece for piece in pieces if piece.learned))
    if long_rows == "drop":
        return SamplePieces((), sample.learned)
    # Without what follows the last learned token: the beginning of a question whose answer did not fit.
    learned = np.flatnonzero(sample.labels[:max_length] != MASKED)
    head = _cut(sample, 0, int(learned[-1]) + 1 if learned.size else max_length)
    pieces = [head] if head.learned else []
    if long_rows == "split":
        pieces += _further(sample, max_length)
    # Pieces never learn a token twice: overlaps and repeated prompts are masked.
    return SamplePieces(tuple(pieces), sample.learned - sum(piece.learned for piece in pieces))


def _further(sample: TokenizedSample, max_length: int) -> list[TokenizedSample]:
    """What of each answer the first piece does not hold: its prompt again, some of the text before, and the rest."""
    pieces: list[TokenizedSample] = []
    learned = np.concatenate(([False], sample.labels != MASKED, [False]))
    edges = np.flatnonzero(np.diff(learned.astype(np.int8))).tolist()
    for start, stop in zip(edges[::2], edges[1::2], strict=True):  # an answer: a run of learned tokens
        room = max_length - start
        # Under half of the length the prompt would be repeated more often than anything is learned.
        if stop <= max_length or room < max_length // 2:
            continue
        at = max(start, max_length)
        overlap = room // _OVERLAP if at > start else 0
        while at < stop:
            end = min(stop, at - overlap + room)
            middle = _cut(sample, at - overlap, end)
            middle.labels[:overlap] = MASKED
            labels = np.concatenate([np.full(start, MASKED), middle.labels])
            pieces.append(TokenizedSample(np.concatenate([sample.input_ids[:start], middle.input_ids]), labels))
            at, overlap = end, room // _OVERLAP
    return pieces


def _cut(sample: TokenizedSample, start: int, stop: int) -> TokenizedSample:
    return TokenizedSample(sample.input_ids[start:stop].copy(), sample.labels[start:stop].copy())
