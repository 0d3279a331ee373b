"""Sequences merged into trees: nothing is lost, nothing sees what it should not, and nothing is computed twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multilora_cases import DEVICES

from fedmoe.models.prefix_tree import ROOT, Forest, batch_forests, grow_forests
from fedmoe.models.tiny import tiny_model

# Few tokens, so that beginnings are shared often.
SEQUENCES = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8).map(tuple), max_size=12)
BUDGETS = st.integers(1, 30)


def ancestors(forest: Forest, node: int) -> list[int]:
    """The node and all above it, from the root on."""
    found = [node]
    while forest.parents[found[-1]] != ROOT:
        found.append(int(forest.parents[found[-1]]))
    return found[::-1]


def prefixes(sequences: list[tuple[int, ...]]) -> set[tuple[int, ...]]:
    return {sequence[:length] for sequence in sequences for length in range(1, len(sequence) + 1)}


@given(SEQUENCES, BUDGETS)
def test_every_sequence_is_in_one_forest_and_its_path_spells_it(sequences: list[tuple[int, ...]], budget: int) -> None:
    forests = grow_forests(sequences, budget)
    assert sorted(member for forest in forests for member in forest.members) == list(range(len(sequences)))
    for forest in forests:
        for member, path in zip(forest.members, forest.paths, strict=True):
            assert tuple(forest.tokens[path].tolist()) == sequences[member]
            assert path.tolist() == ancestors(forest, int(path[-1]))


@given(SEQUENCES, BUDGETS)
def test_children_come_after_their_parents_one_level_deeper(sequences: list[tuple[int, ...]], budget: int) -> None:
    for forest in grow_forests(sequences, budget):
        for node, parent in enumerate(forest.parents.tolist()):
            assert parent < node
            assert forest.depths[node] == (0 if parent == ROOT else forest.depths[parent] + 1)


@given(SEQUENCES, BUDGETS)
def test_a_node_sees_its_ancestors_and_itself_only(sequences: list[tuple[int, ...]], budget: int) -> None:
    for forest in grow_forests(sequences, budget):
        for node, row in enumerate(forest.mask()):
            assert np.flatnonzero(row).tolist() == ancestors(forest, node)


@given(SEQUENCES, BUDGETS)
def test_the_budget_holds_but_for_sequences_that_are_longer_themselves(
    sequences: list[tuple[int, ...]], budget: int
) -> None:
    for forest in grow_forests(sequences, budget):
        assert len(forest) == len(forest.parents) == len(forest.depths) > 0
        assert len(forest) <= budget or len({sequences[member] for member in forest.members}) == 1


@given(SEQUENCES, BUDGETS)
def test_common_beginnings_are_one_path(sequences: list[tuple[int, ...]], budget: int) -> None:
    assert sum(map(len, grow_forests(sequences, budget))) <= sum(map(len, sequences))
    for forest in grow_forests(sequences, budget):
        assert len(forest) == len(prefixes([sequences[member] for member in forest.members]))
    if sequences:
        (forest,) = grow_forests(sequences, sum(map(len, sequences)))
        assert len(forest) == len(prefixes(sequences))


@given(SEQUENCES.filter(len), BUDGETS)
def test_a_batch_pads_with_nodes_that_touch_nobody(sequences: list[tuple[int, ...]], budget: int) -> None:
    forests = grow_forests(sequences, budget)
    ids, positions, mask = batch_forests(forests, torch.device("cpu"))
    size = max(map(len, forests))
    assert mask.shape == (len(forests), 1, size, size)
    for row, forest in enumerate(forests):
        count = len(forest)
        assert ids[row, :count].tolist() == forest.tokens.tolist()
        assert positions[row, :count].tolist() == forest.depths.tolist()
        np.testing.assert_array_equal(mask[row, 0, :count, :count], forest.mask())
        assert not mask[row, 0, :count, count:].any()
        np.testing.assert_array_equal(mask[row, 0, count:], np.eye(size, dtype=np.bool_)[count:])


def test_equal_sequences_share_everything_even_beyond_the_budget() -> None:
    sequences = [(1, 2, 3), (1, 2, 4), (1, 2, 3), (1, 2)]
    (forest,) = grow_forests(sequences, 4)
    assert len(forest) == 4
    assert [len(one) for one in grow_forests([(1, 2, 3)] * 3, 2)] == [3]


def test_an_empty_sequence_is_refused_and_no_sequence_gives_no_forest() -> None:
    assert grow_forests([], 8) == []
    with pytest.raises(ValueError, match="empty"):
        grow_forests([(1,), ()], 8)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=9).map(tuple), min_size=1, max_size=6), BUDGETS)
def test_a_model_computes_for_a_tree_what_it_computes_for_each_sequence(
    sequences: list[tuple[int, ...]], budget: int
) -> None:
    assert_computed_alike([*sequences, (*sequences[0], 7, 8), (*sequences[0], 9)], budget, "cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_long_shared_prompts_are_computed_alike(device: str) -> None:
    prompt = tuple(range(40))
    assert_computed_alike([(*prompt, *range(start, start + 5)) for start in range(50, 58)], 60, device)


def assert_computed_alike(sequences: list[tuple[int, ...]], budget: int, device: str) -> None:
    model = tiny_model().eval().to(device)
    forests = grow_forests(sequences, budget)
    ids, positions, mask = batch_forests(forests, torch.device(device))
    with torch.no_grad():
        logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        for row, forest in enumerate(forests):
            for member, path in zip(forest.members, forest.paths, strict=True):
                alone = model(input_ids=torch.tensor([sequences[member]], device=device)).logits[0]
                torch.testing.assert_close(logits[row, path], alone, atol=1e-4, rtol=1e-5)
