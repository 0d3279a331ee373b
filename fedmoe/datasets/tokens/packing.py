"""Packs samples into blocks of equal length without attention across samples, and draws batches of blocks."""

from __future__ import annotations

import zlib
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.tokenized_sample import MASKED, Int64Array, TokenizedSample

PADDING_SEGMENT = -1


@dataclass(frozen=True, eq=False)
class Block:
    """Packed samples, four int64 arrays of shape (length,).

    `labels` are aligned with `input_ids` (the model shifts them), `MASKED` without loss and on the first token of
    each sample; `position_ids` restart at 0 with each sample; `segment_ids` count samples from 0, padding is -1.
    A token may attend only to earlier tokens of its own segment.
    """

    input_ids: Int64Array
    labels: Int64Array
    position_ids: Int64Array
    segment_ids: Int64Array


@dataclass(frozen=True, eq=False)
class Batch:
    """Blocks on top of each other: the arrays of `Block` with shape (batch, length)."""

    input_ids: Int64Array
    labels: Int64Array
    position_ids: Int64Array
    segment_ids: Int64Array

    @property
    def learned(self) -> int:
        """Tokens that carry loss."""
        return int(np.count_nonzero(self.labels != MASKED))


def pack(samples: Sequence[TokenizedSample], block_length: int, seed: int, pad_id: int = 0) -> list[Block]:
    """Every sample whole in one block (best fit, longest first), blocks in an order drawn from `seed`.

    Raises `DataError` if there is no sample, or one is empty or longer than `block_length`.
    """
    if not samples:
        raise DataError("no samples to pack")
    lengths = [len(sample.input_ids) for sample in samples]
    if min(lengths) < 1 or max(lengths) > block_length:
        raise DataError(f"samples of {min(lengths)} to {max(lengths)} tokens do not fit blocks of {block_length}")
    random = np.random.default_rng(seed)
    order = random.permutation(len(samples)).tolist()
    order.sort(key=lambda index: -lengths[index])
    groups = _best_fit([(index, lengths[index]) for index in order], block_length)
    groups = [groups[index] for index in random.permutation(len(groups)).tolist()]
    return [_block([samples[index] for index in group], block_length, pad_id) for group in groups]


def _best_fit(items: list[tuple[int, int]], capacity: int) -> list[list[int]]:
    """Groups of item indices whose lengths add up to at most `capacity`; each item goes where least room is left."""
    groups: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room left, group), sorted
    for index, length in items:
        place = bisect_left(rooms, (length, 0))
        if place < len(rooms):
            room, group = rooms.pop(place)
        else:
            room, group = capacity, len(groups)
            groups.append([])
        groups[group].append(index)
        if room > length:
            insort(rooms, (room - length, group))
    return groups


def _block(samples: list[TokenizedSample], length: int, pad_id: int) -> Block:
    block = Block(
        np.full(length, pad_id, np.int64),
        np.full(length, MASKED, np.int64),
        np.zeros(length, np.int64),
        np.full(length, PADDING_SEGMENT, np.int64),
    )
    start = 0
    for segment, sample in enumerate(samples):
        stop = start + len(sample.input_ids)
        block.input_ids[start:stop] = sample.input_ids
        # The first token stays masked: the model's shift would have the sample before predict it.
        block.labels[start + 1 : stop] = sample.labels[1:]
        block.position_ids[start:stop] = np.arange(stop - start)
        block.segment_ids[start:stop] = segment
        start = stop
    return block


def collate(blocks: Sequence[Block]) -> Batch:
    """Blocks of one length as a batch of shape (batch, length)."""
    if not blocks:
        raise DataError("a batch needs at least one block")
    return Batch(*(np.stack([getattr(block, field.name) for block in blocks]) for field in fields(Block)))


class BlockSampler:
    """Blocks without end, each epoch in a new order that follows from (seed, epoch) alone.

    With several processes each takes every `world_size`-th block of the same order, so that an epoch's shards are
    disjoint and equally long; up to `world_size - 1` blocks sit out an epoch, others each time.
    """

    def __init__(self, blocks: Sequence[Block], seed: int, rank: int = 0, world_size: int = 1) -> None:
        if not 0 <= rank < world_size:
            raise DataError(f"rank must be in 0..{world_size - 1}, got {rank}")
        if len(blocks) < world_size:
            raise DataError(f"{len(blocks)} blocks cannot be shared by {world_size} processes; give more data")
        #: All blocks, those of other shards too.
        self.blocks = blocks
        fingerprint = 0
        for block in blocks:
            fingerprint = zlib.crc32(block.labels.tobytes(), zlib.crc32(block.input_ids.tobytes(), fingerprint))
        self._identity = {"seed": seed, "rank": rank, "world_size": world_size, "blocks": len(blocks)}
        self._identity["fingerprint"] = fingerprint
        self._move_to(0, 0)

    @property
    def shard(self) -> int:
        """Blocks that this rank is given in an epoch."""
        return len(self._order)

    def next(self, batch_size: int) -> list[Block]:
        """The next `batch_size` blocks, across the end of an epoch where needed."""
        if batch_size < 1:
            raise DataError(f"batch_size must be at least 1, got {batch_size}")
        taken: list[Block] = []
        while len(taken) < batch_size:
            taken.append(self.blocks[self._order[self._position]])
            self._position += 1
            if self._position == len(self._order):
                self._move_to(self.epoch + 1, 0)
        return taken

    def state(self) -> dict[str, int]:
        """Where the sampler stands, and of what data; `restore` takes it back."""
        return {**self._identity, "epoch": self.epoch, "position": self._position}

    def fits(self, state: Mapping[str, int]) -> bool:
        """Whether `state` was taken of the same data in the same order, by the same shard."""
        return all(state.get(key) == now for key, now in self._identity.items())

    def restore(self, state: Mapping[str, int]) -> None:
        """Resume exactly where `state` was taken; raises `DataError` if it does not fit."""
        if not self.fits(state):
            now = self._identity
            changed = [f"{key} {state.get(key)} -> {now[key]}" for key in now if state.get(key) != now[key]]
            raise DataError(f"the saved position is of other data ({', '.join(changed)}); start afresh")
        epoch, position = state.get("epoch", -1), state.get("position", -1)
        if epoch < 0 or not 0 <= position < len(self._order):
            raise DataError(f"the saved position is not valid: epoch {epoch}, position {position}; start afresh")
        self._move_to(epoch, position)

    def start_anew(self, state: Mapping[str, int]) -> None:
        """Begin the epoch after that of `state`, which was taken of other data or another order."""
        self._move_to(max(0, state.get("epoch", 0)) + 1, 0)

    def _move_to(self, epoch: int, position: int) -> None:
        """Stand at a place of the order that belongs to the epoch."""
        #: Times the whole shard has been given out.
        self.epoch = epoch
        self._position = position
        total, world_size = len(self.blocks), self._identity["world_size"]
        random = np.random.default_rng((self._identity["seed"], epoch))
        order: list[int] = random.permutation(total)[: total - total % world_size].tolist()
        self._order = order[self._identity["rank"] :: world_size]
