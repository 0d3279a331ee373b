"""Batch plan: which requests wait, and which rows join and leave the batch between two decoding steps.

No threads, no tensors, no clock: `scheduler` holds a lock around it and computes what it says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Generic, TypeVar

from fedmoe.inference.batching.sampler import BatchRow

Row = TypeVar("Row", bound=BatchRow)


class BatchPlan(Generic[Row]):
    """Rows are computed in the order they came, at most `most` at once; a row that joined is never preempted.

    `prompt_tokens` bounds the prompts that are read between two tokens: the rows in the batch wait meanwhile.
    """

    def __init__(self, most: int, prompt_tokens: int) -> None:
        self.waiting: deque[Row] = deque()
        self.rows: list[Row] = []
        self._most, self._prompt_tokens = most, prompt_tokens

    @property
    def has_room(self) -> bool:
        """Whether a row waits that could join now."""
        return bool(self.waiting) and len(self.rows) < self._most

    def take_joining(self) -> tuple[list[Row], list[Row]]:
        """Take the rows that join now out of those that wait, and (second) those given up before their turn.

        As many as there is room for, whose prompts together are short enough; a single longer prompt is read alone.
        """
        joining: list[Row] = []
        dropped: list[Row] = []
        tokens = 0
        while self.waiting and len(self.rows) + len(joining) < self._most:
            tokens += len(self.waiting[0].request.prompt)
            if joining and tokens > self._prompt_tokens:
                break
            row = self.waiting.popleft()
            (dropped if row.given_up else joining).append(row)
        return joining, dropped

    def put_back(self, joining: Sequence[Row]) -> None:
        """Put rows that were taken to join back at the head of the queue."""
        self.waiting.extendleft(reversed(joining))

    def given_up(self) -> frozenset[int]:
        """Places of the rows whose rest is no longer wanted."""
        return frozenset(place for place, row in enumerate(self.rows) if row.given_up)

    def leave(self, places: frozenset[int]) -> tuple[list[Row], list[int]]:
        """Take the rows at `places` out; returns them, and for each place that stays which row moves there."""
        leaving = [self.rows[place] for place in sorted(places)]
        staying = compaction(len(self.rows), places)
        self.rows = [self.rows[place] for place in staying]
        return leaving, staying

    def clear(self) -> list[Row]:
        """Take out all rows, those that wait too."""
        dropped = [*self.rows, *self.waiting]
        self.rows = []
        self.waiting.clear()
        return dropped


def ended_rows(rows: Sequence[BatchRow], broken: Collection[int]) -> frozenset[int]:
    """Places of the rows that got their last token, or (`broken`) numbers that no token can be drawn from."""
    return frozenset(place for place, row in enumerate(rows) if place in broken or row.finish is not None)


def compaction(count: int, leaving: frozenset[int]) -> list[int]:
    """Which row stands in which place after the rows `leaving` are gone: the last ones fill the holes, others stay."""
    staying = [row for row in range(count) if row not in leaving]
    fill = [row for row in staying if row >= len(staying)]
    return [fill.pop() if place in leaving else place for place in range(len(staying))]
