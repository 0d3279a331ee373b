"""Which continuations share a batch: it follows from what is asked for, whoever computes it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.models.sample_batches import cut_batches, in_order

ASKED = st.lists(st.tuples(st.sampled_from(["", "ann@0", "bob@3"]), st.integers(1, 40)), max_size=60)


@given(ASKED, st.integers(1, 20))
def test_every_place_is_in_one_batch_and_no_batch_is_too_long(asked: list[tuple[str, int]], rows: int) -> None:
    batches = cut_batches(asked, rows)
    assert sorted(place for batch in batches for place in batch) == list(range(len(asked)))
    assert all(1 <= len(batch) <= rows for batch in batches)
    assert len(batches) == -(-len(asked) // rows)


@given(ASKED, st.integers(1, 20))
def test_a_batch_cut_again_stays_as_it_is(asked: list[tuple[str, int]], rows: int) -> None:
    for batch in cut_batches(asked, rows):
        assert cut_batches([asked[place] for place in batch], rows) == [list(range(len(batch)))]


def test_rows_of_one_adapter_and_like_lengths_are_together() -> None:
    asked = [("bob", 9), ("", 4), ("bob", 2), ("ann", 7), ("bob", 2), ("", 1)]
    assert cut_batches(asked, 2) == [[5, 1], [3, 2], [4, 0]]


@given(ASKED, st.integers(1, 20))
def test_answers_come_back_in_the_order_of_what_was_asked(asked: list[tuple[str, int]], rows: int) -> None:
    batches = cut_batches(asked, rows)
    assert in_order(batches, [[place * 10 for place in batch] for batch in batches]) == [
        place * 10 for place in range(len(asked))
    ]


def test_a_batch_without_an_answer_for_each_place_is_an_error() -> None:
    with pytest.raises(ValueError, match="shorter"):
        in_order([[0, 1], [2]], [["first"], ["second"]])
