"""Token sequences with common beginnings merged into trees, so that shared prompts are computed once.

A row of a batch is a forest: one entry a tree node, children after their parents. A node attends to its ancestors and
itself, and its position is its depth, so every path computes exactly what the sequence alone would.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
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


def shared_length(before: Sequence[int], sequence: Sequence[int]) -> int:
    """How many tokens both begin with in common."""
    for place, (left, right) in enumerate(zip(before, sequence, strict=False)):
        if left != right:
            return place
    return min(len(before), len(sequence))


def grow_forests(sequences: Sequence[Sequence[int]], max_nodes: int) -> list[Forest]:
    """Pack sequences into forests of at most `max_nodes` nodes; a longer sequence (and its equals) gets its own.

    In lexical order, sequences with the longest common beginning are neighbours, so each is compared with one only.
    """
    if any(not sequence for sequence in sequences):
        raise ValueError("an empty sequence has no node; leave it out")
    groups: list[list[int]] = []
    nodes = 0
    previous: Sequence[int] = ()
    for member in sorted(range(len(sequences)), key=lambda index: tuple(sequences[index])):
        sequence = sequences[member]
        cost = len(sequence) - shared_length(previous, sequence)
        if not groups or (cost > 0 and nodes + cost > max_nodes):
            groups.append([])
            nodes, cost = 0, len(sequence)
        groups[-1].append(member)
        nodes, previous = nodes + cost, sequence
    return [_forest(sequences, members) for members in groups]


def _forest(sequences: Sequence[Sequence[int]], members: Sequence[int]) -> Forest:
    """The forest of some sequences; token by token only where they differ from the one before."""
    tokens: list[int] = []
    parents: list[int] = []
    depths: list[int] = []
    paths: list[IntVector] = []
    path: list[int] = []
    previous: Sequence[int] = ()
    for member in members:
        sequence = sequences[member]
        del path[shared_length(previous, sequence) :]
        for depth in range(len(path), len(sequence)):
            parents.append(path[-1] if path else ROOT)
            path.append(len(tokens))
            tokens.append(sequence[depth])
            depths.append(depth)
        paths.append(np.array(path, np.int64))
        previous = sequence
    nodes, above, places = (np.array(values, np.int64) for values in (tokens, parents, depths))
    return Forest(nodes, above, places, tuple(paths), tuple(members))


def batch_forests(forests: Sequence[Forest], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Forests as rows of one batch, padded at the end with nodes that see only themselves.

    Token ids and positions, int64 (rows, n), and the mask, bool (rows, 1, n, n).
    """
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
    return torch.from_numpy(ids).to(device), torch.from_numpy(positions).to(device), torch.from_numpy(mask).to(device)
