from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.arena.modes.advantages import BaselineError, BaselineKey, MovingBaselines, group_advantages
from fedmoe.runtime.saved_state import SavedStateError, restored, saved_state

laws = settings(deadline=None, max_examples=60)
reward_lists = st.lists(st.floats(-2, 2), min_size=1, max_size=12)
KEY = BaselineKey("textarena:KuhnPoker-v0", "first", "alice")
OTHERS = [
    BaselineKey(KEY.task, "second", "alice"),
    BaselineKey(KEY.task, "first", "bob"),
    BaselineKey("nim", "first", "alice"),
]


@st.composite
def grouped(draw: st.DrawFn) -> tuple[list[float], list[int]]:
    rewards = draw(reward_lists)
    return rewards, draw(st.lists(st.integers(0, 3), min_size=len(rewards), max_size=len(rewards)))


@laws
@given(grouped())
def test_advantages_of_a_group_sum_to_zero_and_keep_the_order(case: tuple[list[float], list[int]]) -> None:
    rewards, groups = case
    advantages = group_advantages(rewards, groups)
    for group in set(groups):
        members = [index for index, name in enumerate(groups) if name == group]
        assert sum(advantages[members]) == pytest.approx(0, abs=1e-9)
        by_reward = sorted(members, key=lambda index: rewards[index])
        assert (np.diff(advantages[by_reward]) >= -1e-9).all()


@laws
@given(grouped(), st.floats(-3, 3))
def test_a_bonus_for_everyone_changes_nothing(case: tuple[list[float], list[int]], bonus: float) -> None:
    rewards, groups = case
    shifted = group_advantages([reward + bonus for reward in rewards], groups)
    assert shifted == pytest.approx(group_advantages(rewards, groups), abs=1e-6)


def test_an_advantage_is_in_standard_deviations_of_its_group() -> None:
    rewards, groups = [1.0, 0.0, 0.0, 5.0, 7.0], [0, 0, 0, 1, 1]
    third = 1 / 3
    spreads = [third**0.5] * 3 + [2**0.5] * 2
    centred = [2 * third, -third, -third, -1, 1]
    expected = [value / (spread + 1e-4) for value, spread in zip(centred, spreads, strict=True)]
    assert group_advantages(rewards, groups) == pytest.approx(expected)


def test_a_group_of_one_and_a_group_of_equals_teach_nothing() -> None:
    assert group_advantages([0.7, 0.2, 0.2], [0, 1, 1]).tolist() == [0, 0, 0]


def test_rewards_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(BaselineError, match="2 rewards and 1 groups"):
        group_advantages([1.0, 2.0], [0])
    for wrong in ([math.nan, 1.0], [[1.0, 2.0]]):
        with pytest.raises(BaselineError, match="finite numbers"):
            group_advantages(wrong, [0, 0])


@laws
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.floats(0, 0.99))
def test_each_reward_meets_the_average_of_those_before_it(rewards: list[float], decay: float) -> None:
    baselines = MovingBaselines(decay)
    average = 0.0
    for reward in rewards:
        assert baselines.advantage(KEY, [reward]) == pytest.approx([reward - average])
        average = decay * average + (1 - decay) * reward
    assert baselines.value(KEY) == pytest.approx(average, abs=1e-12)


@laws
@given(reward_lists)
def test_rewards_that_come_together_meet_one_baseline_in_any_order(rewards: list[float]) -> None:
    left, right = MovingBaselines(0.9), MovingBaselines(0.9)
    assert left.advantage(KEY, rewards) == pytest.approx(rewards)
    right.advantage(KEY, sorted(rewards))
    assert left.value(KEY) == pytest.approx(right.value(KEY), abs=1e-12)


def test_equal_rewards_move_the_baseline_as_far_together_as_one_by_one() -> None:
    together, apart = MovingBaselines(0.8), MovingBaselines(0.8)
    together.advantage(KEY, [1.0] * 5)
    for _ in range(5):
        apart.advantage(KEY, [1.0])
    assert together.value(KEY) == pytest.approx(apart.value(KEY))
    assert together.value(KEY) == pytest.approx(1 - 0.8**5)


def test_no_rewards_change_nothing() -> None:
    baselines = MovingBaselines(start=0.5)
    assert baselines.advantage(KEY, []).shape == (0,)
    assert baselines.value(KEY) == 0.5
    assert saved_state(baselines)["baselines"] == []


@pytest.mark.parametrize("other", OTHERS)
def test_task_role_and_policy_have_baselines_of_their_own(other: BaselineKey) -> None:
    baselines = MovingBaselines()
    baselines.advantage(KEY, [1.0])
    assert baselines.value(KEY) > 0
    assert baselines.value(other) == 0


@laws
@given(st.dictionaries(st.sampled_from([KEY, *OTHERS]), reward_lists), st.floats(0, 0.99))
def test_a_state_survives_json(rewards: dict[BaselineKey, list[float]], decay: float) -> None:
    baselines = MovingBaselines(decay, 0.25)
    for key, values in rewards.items():
        baselines.advantage(key, values)
    again = restored(MovingBaselines, json.loads(json.dumps(saved_state(baselines), allow_nan=False)))
    assert saved_state(again) == saved_state(baselines)
    for key in (KEY, *OTHERS):
        assert again.advantage(key, [0.5]).tolist() == baselines.advantage(key, [0.5]).tolist()


def test_a_reset_forgets_everything_and_says_how_many() -> None:
    baselines = MovingBaselines(start=0.1)
    baselines.advantage(KEY, [1.0])
    baselines.advantage(OTHERS[0], [1.0])
    assert baselines.reset() == 2
    assert baselines.value(KEY) == 0.1


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"decay": 0.9, "start": 0.0, "baselines": {}},
        {"decay": 0.9, "start": 0.0, "baselines": [{"task": "nim"}]},
        {"decay": "0.9", "start": 0.0, "baselines": []},
        {"decay": 1.0, "start": 0.0, "baselines": []},
        {"decay": 0.9, "start": 0.0, "baselines": [{"task": "a", "role": "b", "policy": "c", "value": math.nan}]},
        {"decay": 0.9, "start": 0.0, "baselines": [], "more": 1},
    ],
)
def test_a_state_of_something_else_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(SavedStateError):
        restored(MovingBaselines, state)
