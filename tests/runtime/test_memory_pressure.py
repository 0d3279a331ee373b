"""What is done about memory (E16), as pure decisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.runtime.memory_pressure import CALM_CHECKS, Action, Pressure, after_failure, pressure

LIMIT = 1000


def run(state: Pressure, *used: int) -> tuple[list[object], Pressure]:
    actions: list[object] = []
    for value in used:
        action, state = pressure(value, LIMIT, state)
        actions.append(action)
    return actions, state


def test_below_85_percent_nothing_happens() -> None:
    state = Pressure(batch=8, most=8)
    actions, after = run(state, 0, 500, 699, 700, 849)
    assert actions == [Action.NOTHING] * 5
    assert after.batch == 8


def test_near_the_limit_caches_go_first_and_then_the_batch_halves_e16() -> None:
    actions, after = run(Pressure(batch=8, most=8), 850)
    assert (actions, after.batch) == ([Action.DROP_CACHES], 8)
    actions, after = run(after, 850)
    assert (actions, after.batch) == ([Action.NOTHING], 4)


def test_when_empty_caches_were_enough_the_batch_stays() -> None:
    actions, after = run(Pressure(batch=8, most=8), 900, 800, 900, 800)
    assert actions == [Action.DROP_CACHES, Action.NOTHING, Action.DROP_CACHES, Action.NOTHING]
    assert after.batch == 8


def test_a_halved_batch_gets_time_to_take_effect_before_the_next_halving() -> None:
    state = run(Pressure(batch=16, most=16), 900, 900)[1]
    sizes = [state.batch]
    for _ in range(9):
        state = run(state, 900)[1]
        sizes.append(state.batch)
    assert sizes == [8, 8, 8, 8, 4, 4, 4, 4, 2, 2]


def test_above_the_limit_both_happen_at_once_down_to_the_floor_and_then_it_stops() -> None:
    sizes = []
    state = Pressure(batch=8, most=8, least=2)
    for _ in range(2):
        (action,), state = run(state, 1001)
        sizes.append((action, state.batch))
    assert sizes == [(Action.DROP_CACHES, 4), (Action.DROP_CACHES, 2)]
    assert run(state, 1001)[0] == [Action.STOP]


def test_the_smallest_batch_from_the_start_is_told_to_drop_caches_before_it_is_told_to_stop() -> None:
    assert run(Pressure(batch=1, most=1), 2000, 2000)[0] == [Action.DROP_CACHES, Action.STOP]


def test_exactly_the_limit_is_near_and_not_above() -> None:
    assert Action.STOP not in run(Pressure(batch=1, most=1), *[1000] * 50)[0]


def test_after_calm_the_batch_grows_back_e16() -> None:
    state = replace(Pressure(batch=8, most=8), batch=2)
    assert run(state, *[100] * (CALM_CHECKS - 1))[1].batch == 2
    assert run(state, *[100] * CALM_CHECKS)[1].batch == 4
    assert run(state, *[100] * (5 * CALM_CHECKS))[1].batch == 8


def test_one_busy_check_starts_the_calm_anew() -> None:
    state = replace(Pressure(batch=8, most=8), batch=2)
    assert run(state, *[100] * (CALM_CHECKS - 1), 750, *[100] * (CALM_CHECKS - 1))[1].batch == 2


def test_a_growth_that_had_to_be_taken_back_makes_the_next_one_wait_twice_as_long() -> None:
    state = run(replace(Pressure(batch=8, most=8), batch=4), *[100] * CALM_CHECKS)[1]
    assert state.batch == 8
    state = run(state, 900, 900)[1]
    assert (state.batch, state.patience) == (4, 2 * CALM_CHECKS)
    assert run(state, *[100] * (2 * CALM_CHECKS - 1))[1].batch == 4
    assert run(state, *[100] * (2 * CALM_CHECKS))[1].batch == 8


states = st.tuples(st.integers(1, 8), st.integers(0, 56), st.integers(0, 56)).map(
    lambda drawn: Pressure(batch=drawn[0] + min(drawn[1:]), most=drawn[0] + max(drawn[1:]), least=drawn[0])
)


@given(states, st.lists(st.integers(0, 1500), max_size=120))
def test_whatever_happens_the_batch_stays_in_its_bounds_and_stop_is_the_last_resort(
    state: Pressure, sequence: list[int]
) -> None:
    for used in sequence:
        before = state
        action, state = pressure(used, LIMIT, before)
        assert before.least <= state.batch <= before.most
        if action == Action.STOP:
            assert used > LIMIT
            assert before.batch == before.least
            assert before.dropped
        if state.batch > before.batch:
            assert used < 700
        if state.batch < before.batch:
            assert used >= 850


@given(states, st.lists(st.integers(0, 1500), max_size=200))
def test_between_a_halving_and_a_growth_lie_many_calm_checks(state: Pressure, sequence: list[int]) -> None:
    since_change = CALM_CHECKS
    for used in sequence:
        before, since_change = state.batch, since_change + 1
        state = pressure(used, LIMIT, state)[1]
        if state.batch > before:
            assert since_change >= CALM_CHECKS
        if state.batch != before:
            since_change = 0


@given(states, st.integers(700, 849), st.integers(1, 300))
def test_between_the_two_shares_nothing_ever_changes(state: Pressure, used: int, checks: int) -> None:
    actions, after = run(state, *[used] * checks)
    assert set(actions) == {Action.NOTHING}
    assert after.batch == state.batch


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 600), st.integers(1, 40))
def test_when_use_follows_the_batch_it_settles_and_hardly_ever_changes_again(fixed: int, per_row: int) -> None:
    state, changes = Pressure(batch=32, most=32), []
    for check in range(3000):
        action, after = pressure(fixed + per_row * state.batch, LIMIT, state)
        assert action != Action.STOP
        if after.batch != state.batch:
            changes.append(check)
        state = after
    assert len([check for check in changes if check > 1000]) <= 8


@pytest.mark.parametrize(("least", "batch", "most"), [(0, 1, 1), (2, 1, 4), (1, 5, 4)])
def test_bounds_that_contradict_each_other_are_refused(least: int, batch: int, most: int) -> None:
    with pytest.raises(ValueError, match="1 <= least <= batch <= most"):
        Pressure(batch, most, least)


def test_a_new_upper_bound_holds_at_once_and_never_goes_below_the_floor() -> None:
    state = Pressure(batch=8, most=8, least=2)
    assert state.with_most(4).batch == 4
    assert state.with_most(16).batch == 16
    assert (state.with_most(1).batch, state.with_most(1).most) == (2, 2)
    assert replace(state, batch=4).with_most(16).batch == 4


def test_a_failed_allocation_halves_at_once_until_nothing_smaller_is_left() -> None:
    state = after_failure(Pressure(batch=3, most=8))
    assert state is not None
    assert state.batch == 1
    assert after_failure(state) is None
