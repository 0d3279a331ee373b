"""Which continuations are sampled in one batch: decided by the requests alone, the same on every machine.

The other rows of a batch can change the last bits of a row's logits. So whoever deals batches out to several engines
cuts them as a single engine does, and gets the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Answer = TypeVar("Answer")


def cut_batches(asked: Sequence[tuple[str, int]], rows: int) -> list[list[int]]:
    """The places of `asked` in batches of at most `rows`; `asked`: adapter ("" for none) and tokens of the prompt.

    Rows of equal adapter and similar length share a batch.
    """
    order = sorted(range(len(asked)), key=lambda index: asked[index])
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def in_order(batches: Sequence[Sequence[int]], answers: Sequence[Sequence[Answer]]) -> list[Answer]:
    """The answers of all batches in the order of what was asked; every batch has an answer for each of its places."""
    placed = {
        place: answer
        for batch, some in zip(batches, answers, strict=True)
        for place, answer in zip(batch, some, strict=True)
    }
    return [placed[place] for place in range(len(placed))]
