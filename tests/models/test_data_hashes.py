"""What data hold is told apart from the order they are in."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.datasets.tokens.packing import Block, pack
from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample
from fedmoe.models.data_hashes import DataChange, change_between, digest_of, sample_hashes

rows = st.lists(st.integers(0, 5), max_size=12)


def packed(numbers: list[int], seed: int = 0) -> list[Block]:
    lengths = [3 + number for number in numbers]
    return pack([TokenizedSample(ids, ids) for ids in (np.arange(n, dtype=np.int64) for n in lengths)], 16, seed)


@given(rows.filter(len), st.integers(0, 9))
def test_order_and_packing_do_not_matter(numbers: list[int], seed: int) -> None:
    shuffled = sorted(numbers, key=lambda number: (number * 7) % 5)
    one, other = sample_hashes(packed(numbers)), sample_hashes(packed(shuffled, seed))
    assert one.size == len(numbers)
    assert digest_of(one) == digest_of(other)


def test_tokens_and_labels_both_count() -> None:
    ids = np.arange(1, 6, dtype=np.int64)
    masked = np.where(ids < 3, MASKED, ids)
    found = [sample_hashes(pack([TokenizedSample(ids, labels)], 8, 0)) for labels in (ids, masked)]
    assert digest_of(found[0]) != digest_of(found[1])


@given(rows, rows)
def test_what_is_kept_gone_and_new_is_counted_sample_by_sample(before: list[int], now: list[int]) -> None:
    found = change_between(np.sort(np.array(before, np.uint64)), np.sort(np.array(now, np.uint64)))
    kept = sum(min(before.count(number), now.count(number)) for number in set(before))
    assert found == DataChange(kept, len(before) - kept, len(now) - kept)
    assert found.grown == (kept == len(before))
