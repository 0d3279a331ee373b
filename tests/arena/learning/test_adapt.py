"""Learning rate, scale and rank follow the effect of training (E8)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.arena.learning.adapt import (
    AdaptError,
    AdaptiveLora,
    AdaptRules,
    TuningChange,
    TuningParameters,
    UpdateEffect,
    fitted,
)
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape, ShapeError
from fedmoe.runtime.saved_state import SavedStateError, restored, saved_state

laws = settings(deadline=None, max_examples=60)
RULES = AdaptRules(
    min_rate=1e-5,
    max_rate=1e-3,
    min_scale=1.0,
    max_scale=4.0,
    max_rank=16,
    kl_high=0.02,
    patience=5,
    max_drop=0.1,
    ceiling=0.9,
    cooldown=3,
)
KNOBS = TuningParameters(1e-4, 8.0, 4)
HEALTHY = UpdateEffect(reward=0.5, kl=1e-3, gap=0.01)
effects = st.builds(
    UpdateEffect, st.floats(-1, 1), st.sampled_from([0.0, 1e-5, 1e-3, 0.1, math.nan]), st.sampled_from([0.01, 0.3])
)


def watched(machine: AdaptiveLora, seen: Iterable[UpdateEffect]) -> tuple[AdaptiveLora, list[TuningChange]]:
    changes = []
    for effect in seen:
        machine, change = machine.observe(effect, RULES)
        changes += [change] if change else []
    return machine, changes


def test_a_rising_reward_is_left_alone() -> None:
    rising = [replace(HEALTHY, reward=0.02 * step) for step in range(40)]
    assert watched(AdaptiveLora(KNOBS), rising)[1] == []


def test_a_solved_task_is_left_alone() -> None:
    assert watched(AdaptiveLora(KNOBS), [replace(HEALTHY, reward=0.95)] * 60)[1] == []


def test_standing_still_raises_the_rate_first_then_the_scale_and_the_rank_at_last() -> None:
    stuck = replace(HEALTHY, kl=1e-6)
    machine, changes = watched(AdaptiveLora(KNOBS), [stuck] * 120)
    kinds = [change.what for change in changes]
    assert kinds == ["learning_rate"] * 6 + ["alpha"] + ["rank"] * 2
    assert machine.knobs == TuningParameters(1e-3, 64.0, 16)
    assert [change.after for change in changes[-3:]] == [16.0, 8, 16]
    assert all(change.reason.startswith("no gain of 0.01 over the reward 0.5 for ") for change in changes)
    assert "1e-06 nats per token only" in changes[0].reason
    assert "the learning rate is at its maximum" in changes[6].reason
    assert "the scale at its maximum" in changes[7].reason


def test_updates_that_are_large_enough_raise_no_rate() -> None:
    _, changes = watched(AdaptiveLora(KNOBS), [HEALTHY] * 60)
    assert [change.what for change in changes] == ["alpha", "rank", "rank"]
    assert "updates are large enough" in changes[0].reason


def test_a_rank_grows_with_its_alpha_so_that_the_scale_stays() -> None:
    machine, changes = watched(AdaptiveLora(TuningParameters(1e-3, 16.0, 4)), [HEALTHY] * 8)
    assert changes == [TuningChange(6, "rank", 4, 8, changes[0].reason)]
    assert machine.knobs == TuningParameters(1e-3, 32.0, 8)


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (replace(HEALTHY, kl=0.1), "0.1 nats per token, above 0.02"),
        (replace(HEALTHY, kl=math.nan), "nan nats"),
        (replace(HEALTHY, gap=0.3), "0.300 nats per token"),
    ],
)
def test_too_much_lowers_the_rate_first_and_then_the_scale(effect: UpdateEffect, words: str) -> None:
    machine, changes = watched(AdaptiveLora(KNOBS), [effect] * 40)
    assert [change.what for change in changes] == ["learning_rate"] * 4 + ["alpha"]
    assert [change.after for change in changes] == pytest.approx([5e-5, 2.5e-5, 1.25e-5, 1e-5, 4.0])
    assert all(words in change.reason for change in changes)
    assert machine.knobs == TuningParameters(1e-5, 4.0, 4)


def test_a_falling_reward_lowers_the_rate() -> None:
    good = watched(AdaptiveLora(KNOBS), [replace(HEALTHY, reward=0.92)] * 20)[0]
    _, changes = watched(good, [replace(HEALTHY, reward=0.2)] * 3)
    assert [(change.what, change.after) for change in changes] == [("learning_rate", 5e-5)]
    assert "the reward falls" in changes[0].reason


def test_a_change_is_judged_by_what_comes_after_it() -> None:
    """From a fall on the reward rises again: nothing is raised, though it is long below its best."""
    good = watched(AdaptiveLora(KNOBS), [replace(HEALTHY, reward=0.92)] * 20)[0]
    recovering = [replace(HEALTHY, reward=0.2 + 0.03 * step) for step in range(22)]
    machine, changes = watched(good, recovering)
    assert machine.fast < 0.92 - RULES.min_gain
    assert changes
    assert all("the reward falls" in change.reason for change in changes)


def test_after_a_change_it_waits() -> None:
    _, changes = watched(AdaptiveLora(KNOBS), [replace(HEALTHY, kl=0.1)] * 13)
    assert [change.effect for change in changes] == [1, 5, 9, 13]


@laws
@given(st.lists(effects, max_size=60))
def test_no_history_leads_out_of_the_bounds(history: list[UpdateEffect]) -> None:
    machine = AdaptiveLora(KNOBS)
    for effect in history:
        after, change = machine.observe(effect, RULES)
        assert RULES.min_rate <= after.knobs.learning_rate <= RULES.max_rate
        assert RULES.min_scale <= after.knobs.scale <= RULES.max_scale
        assert machine.knobs.rank <= after.knobs.rank <= RULES.max_rank
        assert (after.knobs != machine.knobs) is (change is not None)
        if change:
            assert (change.before, change.after) == (
                getattr(machine.knobs, change.what),
                getattr(after.knobs, change.what),
            )
            assert change.before != change.after
            assert change.reason
        machine = after


@laws
@given(st.lists(effects, max_size=40), st.lists(effects, max_size=40))
def test_a_state_survives_json_and_goes_on_as_before(before: list[UpdateEffect], after: list[UpdateEffect]) -> None:
    machine, _ = watched(AdaptiveLora(KNOBS), before)
    again = restored(AdaptiveLora, json.loads(json.dumps(saved_state(machine), allow_nan=False)))
    assert again == machine
    assert watched(again, after) == watched(machine, after)


def test_an_adapter_fitted_to_the_knobs_computes_the_same() -> None:
    layout = Layout((ModuleShape("m", 6, 5),), 4)
    flat = np.random.default_rng(0).integers(-8, 9, layout.size).astype(np.float32)
    adapter = Adapter(layout, KNOBS.alpha, flat)
    other = fitted(adapter, TuningParameters(1e-4, 64.0, 8), seed=1)
    assert (other.rank, other.alpha) == (8, 64.0)
    a, b = (factor.astype(np.float64) for factor in adapter.module("m"))
    new_a, new_b = (factor.astype(np.float64) for factor in other.module("m"))
    assert np.array_equal(adapter.scale * b @ a, other.scale * new_b @ new_a)
    assert fitted(adapter, KNOBS, seed=1) is adapter
    with pytest.raises(ShapeError, match="recompress"):
        fitted(adapter, TuningParameters(1e-4, 8.0, 2), seed=1)


def test_numbers_that_say_nothing_are_refused() -> None:
    with pytest.raises(AdaptError, match="reward"):
        AdaptiveLora(KNOBS).observe(replace(HEALTHY, reward=math.nan), RULES)
    with pytest.raises(AdaptError, match="positive"):
        TuningParameters(0.0, 1.0, 1)


@pytest.mark.parametrize("change", [{"knobs": {}}, {"knobs": 1}, {"more": 1}, {"fast": "0.5"}])
def test_a_state_of_something_else_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(SavedStateError):
        restored(AdaptiveLora, saved_state(AdaptiveLora(KNOBS)) | change)
