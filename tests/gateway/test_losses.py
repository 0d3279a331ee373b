"""The matrix of losses: means weighted by tokens, further rows, routed rows."""

from __future__ import annotations

import math

import pytest

from fedmoe.gateway.losses import BASE, LossMatrix

BLOCKS = {BASE: {"sql": [2.0, 4.0]}, "one": {"sql": [1.0, 4.0]}, "two": {"sql": [3.0, 2.0]}}
MATRIX = LossMatrix.of_blocks(BLOCKS, {"sql": [30, 10]})


def test_the_mean_counts_every_token_once() -> None:
    assert MATRIX.losses == {BASE: {"sql": 2.5}, "one": {"sql": 1.75}, "two": {"sql": 2.75}}
    assert MATRIX.tokens == {"sql": 40}
    assert (MATRIX.models, MATRIX.domains) == ((BASE, "one", "two"), ("sql",))
    assert MATRIX.sums("one", "sql").tolist() == [30.0, 40.0]


def test_a_block_without_labels_counts_nothing() -> None:
    found = LossMatrix.of_blocks({BASE: {"sql": [2.0, math.nan]}}, {"sql": [30, 0]})
    assert found.losses[BASE]["sql"] == 2.0
    assert found.sums(BASE, "sql").tolist() == [60.0, 0.0]
    with pytest.raises(ValueError, match="no token"):
        LossMatrix.of_blocks({BASE: {"sql": [math.nan]}}, {"sql": [0]})


def test_a_router_has_on_each_block_the_loss_of_the_model_it_chose() -> None:
    row = MATRIX.routed({"sql": ["one", "two"]})
    found = MATRIX.with_rows({"routed": row})
    assert found.losses["routed"]["sql"] == pytest.approx((1.0 * 30 + 2.0 * 10) / 40)
    assert found.losses["one"] == MATRIX.losses["one"]


@pytest.mark.parametrize("choices", [{}, {"sql": ["one"]}, {"sql": ["one", "three"]}])
def test_a_choice_is_needed_for_every_block(choices: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match="for each of its 2 blocks"):
        MATRIX.routed(choices)


def test_a_row_must_have_every_block_and_a_name_of_its_own() -> None:
    with pytest.raises(ValueError, match="1 block losses on sql, expected 2"):
        MATRIX.with_rows({"routed": {"sql": [1.0]}})
    with pytest.raises(ValueError, match="0 block losses on sql"):
        MATRIX.with_rows({"routed": {}})
    with pytest.raises(ValueError, match="rows for one already"):
        MATRIX.with_rows({"one": {"sql": [1.0, 1.0]}})
