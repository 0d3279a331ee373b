"""When held-out loss is measured, and what a row of losses means for training."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from fedmoe.datasets.tokens.packing import Block, pack
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample
from fedmoe.models.held_out import HeldOutPlan, HeldOutState, first_blocks


def blocks(count: int, length: int = 16) -> list[Block]:
    ids = np.arange(length, dtype=np.int64)
    return pack([TokenizedSample(ids, ids)] * count, length, 0)


def after(losses: list[float], threshold: float = 0.0) -> list[HeldOutState]:
    states = [HeldOutState("d")]
    for step, loss in enumerate(losses):
        states.append(states[-1].after(step, loss, threshold))
    return states[1:]


@pytest.mark.parametrize(
    ("losses", "threshold", "expected"),
    [
        ([3.0, 2.0, 2.0, 2.1, 1.9], 0.0, [0, 0, 1, 2, 0]),
        ([3.0, 2.95, 2.9, 2.0], 0.2, [0, 1, 2, 0]),
        ([3.0, math.nan, math.inf, 2.0], 0.0, [0, 1, 2, 0]),
        ([math.nan, 3.0, 4.0], 0.0, [0, 0, 1]),
    ],
)
def test_measurements_without_improvement_are_counted(
    losses: list[float], threshold: float, expected: list[int]
) -> None:
    states = after(losses, threshold)
    assert [state.worse for state in states] == expected
    plan = HeldOutPlan(blocks(1), "d", patience=2)
    assert [plan.exhausted(state) for state in states] == [count >= 2 for count in expected]
    assert not any(HeldOutPlan(blocks(1), "d").exhausted(state) for state in states)


def test_the_state_survives_a_checkpoint_bit_for_bit_and_only_for_its_own_data() -> None:
    state = after([3.1, 2.7, math.nan])[-1]
    saved = json.loads(json.dumps(state.to_json()))
    assert repr(HeldOutState.of(saved, "d")) == repr(state)
    assert HeldOutState.of(saved, "other") == HeldOutState("other")
    assert HeldOutState.of({}, "d").step is None


def test_what_is_measured_is_bounded_in_tokens_and_never_nothing() -> None:
    assert len(first_blocks(blocks(40), 16 * 10)) == 10
    assert len(first_blocks(blocks(3), 16 * 10)) == 3
    assert len(first_blocks(blocks(3), 1)) == 1
