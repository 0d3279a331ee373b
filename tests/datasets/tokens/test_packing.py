"""Packing loses nothing and mixes nothing; the sampler goes on after a restart as if nothing had happened."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.packing import PADDING_SEGMENT, Block, BlockSampler, collate, pack
from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample


def sample_of(ids: list[int], masks: list[bool]) -> TokenizedSample:
    tokens = np.array(ids, dtype=np.int64)
    return TokenizedSample(tokens, np.where(np.array(masks, dtype=np.bool_), MASKED, tokens))


def as_key(sample: TokenizedSample) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(sample.input_ids.tolist()), tuple(sample.labels[1:].tolist())


def contents(block: Block) -> list[TokenizedSample]:
    segments = range(int(block.segment_ids.max()) + 1)
    return [
        TokenizedSample(block.input_ids[block.segment_ids == one], block.labels[block.segment_ids == one])
        for one in segments
    ]


LENGTH = 16
token_samples = st.lists(
    st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=LENGTH).map(
        lambda pairs: sample_of([token for token, _ in pairs], [mask for _, mask in pairs])
    ),
    min_size=1,
    max_size=20,
)


@given(token_samples, st.integers(0, 5))
def test_every_sample_is_in_one_block_whole_with_all_its_learned_tokens(
    samples: list[TokenizedSample], seed: int
) -> None:
    blocks = pack(samples, LENGTH, seed)
    packed = [sample for block in blocks for sample in contents(block)]
    assert sorted(map(as_key, packed)) == sorted(map(as_key, samples))
    assert collate(blocks).learned == sum(sample.learned for sample in samples)
    assert all(sample.labels[0] == MASKED for sample in packed)


@given(token_samples, st.integers(0, 5))
def test_segments_are_contiguous_positions_restart_and_the_rest_is_padding(
    samples: list[TokenizedSample], seed: int
) -> None:
    for block in pack(samples, LENGTH, seed, pad_id=7):
        used = int(np.count_nonzero(block.segment_ids != PADDING_SEGMENT))
        steps = np.diff(block.segment_ids[:used])
        assert block.segment_ids[0] == 0
        assert set(steps.tolist()) <= {0, 1}
        restarts = block.position_ids[:used] == 0
        assert np.flatnonzero(restarts).tolist() == [0, *(np.flatnonzero(steps) + 1).tolist()]
        assert (np.diff(block.position_ids[:used])[steps == 0] == 1).all()
        assert (block.segment_ids[used:] == PADDING_SEGMENT).all()
        assert (block.labels[used:] == MASKED).all()
        assert (block.input_ids[used:] == 7).all()


@given(token_samples)
def test_no_two_blocks_could_have_been_one(samples: list[TokenizedSample]) -> None:
    used = sorted(int(np.count_nonzero(block.segment_ids >= 0)) for block in pack(samples, LENGTH, 0))
    assert all(one + other > LENGTH for one, other in pairwise(used))


def test_packing_depends_on_the_seed_and_on_nothing_else() -> None:
    samples = [sample_of([i + 1] * (1 + i % 7), [False] * (1 + i % 7)) for i in range(50)]
    one, same, other = (collate(pack(samples, LENGTH, seed)).input_ids for seed in (3, 3, 4))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)


def test_collate_stacks_blocks() -> None:
    blocks = pack([sample_of([1] * 10, [False] * 10)] * 3, LENGTH, 0)
    batch = collate(blocks)
    for name in ("input_ids", "labels", "position_ids", "segment_ids"):
        array = getattr(batch, name)
        assert array.shape == (3, LENGTH)
        assert array.dtype == np.int64


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="no samples"):
        pack([], LENGTH, 0)
    with pytest.raises(DataError, match="17 tokens do not fit blocks of 16"):
        pack([sample_of([1] * 17, [False] * 17)], LENGTH, 0)
    with pytest.raises(DataError, match="at least one block"):
        collate([])


def blocks_of(count: int) -> list[Block]:
    return [pack([sample_of([i + 1] * 2, [False] * 2)], 2, 0)[0] for i in range(count)]


def names(blocks: list[Block]) -> list[int]:
    return [int(block.input_ids[0]) for block in blocks]


@given(st.integers(1, 9), st.integers(0, 30), st.integers(1, 4), st.integers(0, 3))
def test_a_restored_sampler_goes_on_as_if_never_stopped(count: int, taken: int, batch_size: int, seed: int) -> None:
    blocks = blocks_of(count)
    original = BlockSampler(blocks, seed)
    for _ in range(taken):
        original.next(batch_size)
    state = original.state()
    expected = [names(original.next(batch_size)) for _ in range(10)]
    restored = BlockSampler(blocks, seed)
    restored.restore(state)
    assert [names(restored.next(batch_size)) for _ in range(10)] == expected


@given(st.integers(1, 12), st.integers(0, 3))
def test_each_epoch_gives_every_block_once(count: int, seed: int) -> None:
    sampler = BlockSampler(blocks_of(count), seed)
    for epoch in range(3):
        assert sampler.epoch == epoch
        assert sorted(names(sampler.next(count))) == list(range(1, count + 1))


def test_epochs_and_seeds_have_different_orders() -> None:
    blocks = blocks_of(20)
    sampler = BlockSampler(blocks, 0)
    orders = [names(sampler.next(20)), names(sampler.next(20)), names(BlockSampler(blocks, 1).next(20))]
    assert len({tuple(order) for order in orders}) == 3


@given(st.integers(1, 4), st.integers(0, 8))
def test_shards_are_disjoint_and_equally_long(world_size: int, extra: int) -> None:
    blocks = blocks_of(world_size + extra)
    each = len(blocks) // world_size
    shards = [names(BlockSampler(blocks, 5, rank, world_size).next(each)) for rank in range(world_size)]
    assert len({name for shard in shards for name in shard}) == each * world_size


def test_a_position_in_other_data_is_refused() -> None:
    state = BlockSampler(blocks_of(4), 0).state()
    changed = blocks_of(4)
    changed[2].input_ids[0] = 99
    for sampler in (BlockSampler(changed, 0), BlockSampler(blocks_of(5), 0), BlockSampler(blocks_of(4), 1)):
        with pytest.raises(DataError, match="of other data"):
            sampler.restore(state)
    for broken in ({"position": 4}, {"position": -1}, {"epoch": -1}):
        with pytest.raises(DataError, match="not valid"):
            BlockSampler(blocks_of(4), 0).restore({**state, **broken})


def test_a_sampler_refuses_what_it_cannot_do() -> None:
    with pytest.raises(DataError, match="cannot be shared"):
        BlockSampler(blocks_of(1), 0, 0, 2)
    with pytest.raises(DataError, match="rank"):
        BlockSampler(blocks_of(3), 0, 2, 2)
    with pytest.raises(DataError, match="batch_size"):
        BlockSampler(blocks_of(1), 0).next(0)
