"""Token sequences with common beginnings merged into trees, so that shared prompts are computed once.

A row of a batch is a forest: one entry a tree node, children after their parents. A node attends to its ancestors and
itself, and its position is its depth, so every path computes exactly what the sequence alone would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntVector = NDArray[np.int64]
ROOT = -1


@dataclass(frozen=True)
class Forest:
    """One row. `tokens`, `parents` (ROOT: none) and `depths` have one entry a node, int64 (n,).

    `paths[k]` are the nodes of the k-th sequence, first token first, int64 (length,); `members[k]` says which of the
    sequences given it is.
    """

    tokens: IntVector
    parents: IntVector
    depths: IntVector
    paths: tuple[IntVector, ...]
    members: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def mask(self) -> NDArray[np.bool_]:
        """bool (n, n), True where a node (row) may look: at its ancestors and itself."""
        size = len(self.tokens)
        looks = np.zeros((size, size), np.bool_)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                looks[node] = looks[parent]
            looks[node, node] = True
        return looks


class _ForestBuilder:
    """A forest that sequences are added to; token by token only where they differ from the one before."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.depths: list[int] = []
        self.paths: list[IntVector] = []
        self.members: list[int] = []
        self._previous: Sequence[int] = ()
        self._path: list[int] = []

    def cost(self, sequence: Sequence[int]) -> int:
        return len(sequence) - _shared(self._previous, sequence)

    def add(self, member: int, sequence: Sequence[int]) -> None:
        shared = _shared(self._previous, sequence)
        del self._path[shared:]
        for depth in range(shared, len(sequence)):
            self.parents.append(self._path[-1] if self._path else ROOT)
            self._path.append(len(self.tokens))
            self.tokens.append(sequence[depth])
            self.depths.append(depth)
        self._previous = sequence
        self.paths.append(np.array(self._path, np.int64))
        self.members.append(member)

    def forest(self) -> Forest:
        tokens, parents, depths = (np.array(values, np.int64) for values in (self.tokens, self.parents, self.depths))
        return Forest(tokens, parents, depths, tuple(self.paths), tuple(self.members))


def _shared(before: Sequence[int], sequence: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for one, other in zip(before, sequence, strict=False):
        if one != other:
            break
        count += 1
    return count


def grow_forests(sequences: Sequence[Sequence[int]], max_nodes: int) -> list[Forest]:
    """Pack sequences into forests of at most `max_nodes` nodes; a longer sequence (and its equals) gets its own.

    In lexical order, sequences with the longest common beginning are neighbours, so each is compared with one only.
    """
    if any(not sequence for sequence in sequences):
        raise ValueError("an empty sequence has no node; leave it out")
    forests: list[Forest] = []
    builder = _ForestBuilder()
    for member in sorted(range(len(sequences)), key=lambda index: tuple(sequences[index])):
        sequence = sequences[member]
        cost = builder.cost(sequence)
        if builder.members and cost > 0 and len(builder.tokens) + cost > max_nodes:
            forests.append(builder.forest())
            builder = _ForestBuilder()
        builder.add(member, sequence)
    if builder.members:
        forests.append(builder.forest())
    return forests


@dataclass(frozen=True)
class ForestBatch:
    """Forests as rows of one batch, padded at the end with nodes that see only themselves.

    `input_ids`, `position_ids`: int64 (rows, n); `mask`: bool (rows, 1, n, n).
    """

    input_ids: IntVector
    position_ids: IntVector
    mask: NDArray[np.bool_]


def batch_forests(forests: Sequence[Forest]) -> ForestBatch:
    """Stack forests, padded to the longest."""
    rows, size = len(forests), max(len(forest) for forest in forests)
    ids = np.zeros((rows, size), np.int64)
    positions = np.zeros((rows, size), np.int64)
    mask = np.zeros((rows, 1, size, size), np.bool_)
    mask[:, 0, range(size), range(size)] = True
    for row, forest in enumerate(forests):
        count = len(forest)
        ids[row, :count] = forest.tokens
        positions[row, :count] = forest.depths
        mask[row, 0, :count, :count] = forest.mask()
    return ForestBatch(ids, positions, mask)
