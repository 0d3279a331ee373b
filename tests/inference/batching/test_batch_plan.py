"""The batch plan without threads or a model: who joins, who waits, who leaves, and where the others stand then."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.inference.backend import ContinuationRequest, SamplingOptions
from fedmoe.inference.batching.plan import BatchPlan, compaction, ended_rows
from fedmoe.inference.batching.sampler import BatchRow


def row(prompt: int, new: int = 4) -> BatchRow:
    return BatchRow(ContinuationRequest(None, (1,) * prompt, SamplingOptions(new)), frozenset({0}))


def plan(rows: list[BatchRow], most: int = 3, prompt_tokens: int = 10) -> BatchPlan[BatchRow]:
    made: BatchPlan[BatchRow] = BatchPlan(most, prompt_tokens)
    made.waiting.extend(rows)
    return made


def test_rows_join_in_the_order_they_came_while_there_is_room() -> None:
    rows = [row(1) for _ in range(5)]
    batch = plan(rows)
    assert batch.has_room
    joining, dropped = batch.take_joining()
    assert (joining, dropped) == (rows[:3], [])
    batch.rows += joining
    assert not batch.has_room
    assert batch.take_joining() == ([], [])
    batch.leave(frozenset({0}))
    assert batch.take_joining() == (rows[3:4], [])


@pytest.mark.parametrize(
    ("prompts", "together"),
    [([4, 4, 4], 2), ([11, 1], 1), ([10, 1], 1), ([1, 11, 1], 1), ([5, 5, 1], 2)],
)
def test_prompts_are_read_together_up_to_a_bound_and_a_long_one_alone(prompts: list[int], together: int) -> None:
    rows = [row(length) for length in prompts]
    assert plan(rows).take_joining()[0] == rows[:together]


def test_rows_given_up_before_their_turn_take_no_place() -> None:
    rows = [row(1) for _ in range(5)]
    rows[0].given_up = rows[2].given_up = True
    batch = plan(rows, most=2)
    assert batch.take_joining() == ([rows[1], rows[3]], [rows[0], rows[2]])
    assert list(batch.waiting) == rows[4:]


def test_rows_whose_prompts_could_not_be_read_wait_again_before_the_others() -> None:
    rows = [row(1) for _ in range(5)]
    batch = plan(rows)
    joining, _ = batch.take_joining()
    batch.put_back(joining)
    assert list(batch.waiting) == rows
    assert batch.clear() == rows
    assert not batch.waiting


def test_rows_leave_at_their_end_or_when_given_up_and_the_last_ones_fill_the_holes() -> None:
    rows = [row(1, new) for new in (1, 2, 2, 2)]
    batch = plan([])
    batch.rows += rows
    for one in rows:
        one.tokens.append(7)
    rows[2].tokens[-1] = 0  # ends a text
    assert ended_rows(rows, ()) == {0, 2}
    assert ended_rows(rows, {1}) == {0, 1, 2}
    rows[3].given_up = True
    assert batch.given_up() == {3}
    left, kept = batch.leave(frozenset({0}))
    assert (left, kept, batch.rows) == ([rows[0]], [3, 1, 2], [rows[3], rows[1], rows[2]])


@given(st.integers(0, 12).flatmap(lambda count: st.tuples(st.just(count), st.frozensets(st.integers(0, 12)))))
def test_who_stays_stands_without_holes_and_never_moves_back(case: tuple[int, frozenset[int]]) -> None:
    count, left = case[0], frozenset(row for row in case[1] if row < case[0])
    kept = compaction(count, left)
    assert sorted(kept) == [row for row in range(count) if row not in left]
    assert all(source == target or source >= len(kept) for target, source in enumerate(kept))
