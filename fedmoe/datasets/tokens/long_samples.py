"""Fits samples to `max_length`: plain text is split; long answers are truncated, split or dropped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample

#: What becomes of a prompt with an answer that does not fit: the answer's tail goes, or further samples repeat the
#: prompt, or the row is left out. Running text is split in every case.
LongRowPolicy = Literal["truncate", "split", "drop"]
LONG_ROW_POLICIES: tuple[LongRowPolicy, ...] = get_args(LongRowPolicy)
# The part of an answer's room that repeats the text before it, so that no loss falls on the seam.
_OVERLAP = 8


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
