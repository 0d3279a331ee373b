"""Tokenised samples with labels, the tokenizer protocol, and previews as text.

Labels are aligned with the tokens (the model shifts them); `MASKED` marks a token without loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

MASKED = -100
Int64Array = NDArray[np.int64]


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used (any fast one fits)."""

    @property
    def is_fast(self) -> bool: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def chat_template(self) -> object: ...

    def __call__(
        self, text: str, *, add_special_tokens: bool = ..., return_offsets_mapping: bool = ..., verbose: bool = ...
    ) -> Mapping[str, list[object]]: ...

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True, eq=False)
class TokenizedSample:
    """Token ids and labels of equal length, int64; `MASKED` labels carry no loss."""

    input_ids: Int64Array
    labels: Int64Array

    @property
    def learned(self) -> int:
        """Tokens that carry loss; the first token never does, as nothing predicts it."""
        return int(np.count_nonzero(self.labels[1:] != MASKED))


@dataclass(frozen=True)
class RenderResult:
    """One sample in full length; a conversation can give several. `notes` say what of the row is not in them."""

    samples: tuple[TokenizedSample, ...]
    notes: tuple[str, ...] = ()


def previews(samples: Sequence[TokenizedSample], tokenizer: Tokenizer, max_chars: int = 2000) -> tuple[str, ...]:
    """The first two samples as text for a person, what is learned between `>>>` and `<<<`."""
    blocks = []
    for number, sample in enumerate(samples[:2], start=1):
        learned = sample.labels != MASKED
        cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(learned)]
        text = ""
        for start, stop in pairwise(cuts):
            if start < stop:
                part = _printable(tokenizer.decode(sample.input_ids[start:stop].tolist()))
                text += f">>>{part}<<<" if learned[start] else part
        cut = f"... ({len(text) - max_chars:,} more characters)" if len(text) > max_chars else ""
        head = f"--- sample {number}: {len(sample.input_ids)} tokens, {sample.learned} with loss (between >>> and <<<)"
        blocks.append(f"{head}\n{text[:max_chars]}{cut}")
    return tuple(blocks)


def _printable(text: str) -> str:
    # A data set may hold terminal escapes; a preview must not run them.
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
