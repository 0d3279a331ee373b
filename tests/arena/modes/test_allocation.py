"""The budget: every episode is given out, nobody starves, and more goes where there is more to learn."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.arena.modes.allocation import LearningSignal, allocate
from fedmoe.runtime.saved_state import restored, saved_state

deviations = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.floats(0, 1e300), min_size=1, max_size=9)


@given(deviations, st.integers(0, 5), st.integers(0, 500))
def test_the_whole_budget_is_given_and_the_floor_kept(known: dict[str, float], floor: int, extra: int) -> None:
    total = floor * len(known) + extra
    counts = allocate(total, known, floor)
    assert sum(counts.values()) == total
    assert set(counts) == set(known)
    assert all(count >= floor for count in counts.values())


@given(deviations, st.integers(0, 500))
def test_who_has_more_to_learn_never_gets_less(known: dict[str, float], extra: int) -> None:
    counts = allocate(len(known) + extra, known)
    order = sorted(known, key=lambda key: known[key])
    for less, more in pairwise(order):
        assert counts[less] <= counts[more] + (known[less] == known[more])


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=4), st.integers(0, 12))
def test_no_exchange_of_one_group_lowers_the_variance_by_much(known: list[float], extra: int) -> None:
    """Rounded Neyman: against the best whole-numbered neighbours at most a few per cent are lost."""
    keys = dict(zip("abcd", known, strict=False))
    counts = allocate(4 * len(keys) + extra, keys)
    variance = sum(keys[key] ** 2 / counts[key] for key in keys)
    for giver in keys:
        for taker in keys:
            moved = counts | {giver: counts[giver] - 1, taker: counts[taker] + 1}
            if giver != taker and moved[giver] >= 1:
                assert sum(keys[key] ** 2 / moved[key] for key in keys) > 0.85 * variance


def test_shares_are_in_proportion_and_what_teaches_nothing_gets_the_floor() -> None:
    assert allocate(60, {"a": 0.1, "b": 0.2, "c": 0.3}) == {"a": 10, "b": 20, "c": 30}
    silent = {"solved": 0.0, "hopeless": 0.0}
    assert allocate(22, silent | {"a": 0.5, "b": 0.5}) == {"solved": 1, "hopeless": 1, "a": 10, "b": 10}
    assert allocate(10, {"a": 0.0, "b": 0.0, "c": 0.0}) == {"a": 4, "b": 3, "c": 3}


def test_what_cannot_be_given_is_refused() -> None:
    with pytest.raises(ValueError, match="2 groups"):
        allocate(2, {"a": 1.0, "b": 1.0, "c": 1.0})
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="deviations"):
            allocate(9, {"a": wrong})
    with pytest.raises(ValueError, match="0 keys"):
        allocate(3, {})


def deviation(signal: LearningSignal, key: str) -> float:
    return signal.deviations([key])[key]


def test_the_signal_is_the_deviation_within_groups_and_not_between_them() -> None:
    signal = LearningSignal()
    rng = np.random.default_rng(0)
    for _ in range(200):
        signal.observe("solved", [1.0] * 8)
        signal.observe("either all or none", [float(rng.integers(2))] * 8)
        signal.observe("half", [float(value) for value in rng.permutation([0, 0, 0, 0, 1, 1, 1, 1])])
    assert deviation(signal, "solved") < 0.01
    assert deviation(signal, "either all or none") < 0.01
    assert deviation(signal, "half") == pytest.approx(0.5)
    assert allocate(30, signal.deviations(["solved", "either all or none", "half"]))["half"] == 28


def test_what_was_never_tried_counts_as_full_of_promise_and_old_groups_fade() -> None:
    signal = LearningSignal()
    assert deviation(signal, "new") == 0.5
    for _ in range(50):
        signal.observe("once hard", [0.0, 0.0])
    assert deviation(signal, "once hard") < 0.05
    for _ in range(30):
        signal.observe("once hard", [0.0, 1.0])
    assert deviation(signal, "once hard") > 0.45


def test_a_checkpoint_loses_nothing_and_bad_groups_are_refused() -> None:
    signal = LearningSignal(memory=0.8)
    signal.observe("a", [0.0, 0.3, 0.9])
    again = restored(LearningSignal, json.loads(json.dumps(saved_state(signal))))
    for each in (signal, again):
        each.observe("a", [0.1, 0.2])
    assert again == signal
    for group in ([], [1.0], [float("nan"), 0.0]):
        with pytest.raises(ValueError, match="two or more"):
            signal.observe("a", group)
