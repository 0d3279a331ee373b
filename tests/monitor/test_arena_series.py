"""Records of an arena run become series; what is missing is empty, what is not there at all is an error."""

from __future__ import annotations

import math

import numpy as np
import pytest
from arena_records import series_of, without
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.monitor.arena_series import (
    KINDS,
    ModeSpan,
    NoRecordsError,
    arena_series,
    smoothed,
    window,
)
from fedmoe.runtime.records import Record

FINITE = st.floats(-1e6, 1e6, allow_nan=False)


def policy(iteration: int, name: str = "a", **values: float | str | None) -> Record:
    return {"at": 100.0 + iteration, "kind": "policy", "iteration": iteration, "policy": name, **values}


def test_a_policy_gets_its_own_numbers_in_order() -> None:
    found = arena_series([policy(2, reward=0.3), policy(0, reward=0.1), policy(1, "b", reward=9.0)])
    assert found.policies == ("a", "b")
    assert found.tables["a"].x.tolist() == [0, 2]
    assert found.tables["a"].column("reward").tolist() == [0.1, 0.3]
    assert found.tables["b"].column("reward").tolist() == [9.0]
    assert found.iterations == (0, 2)


def test_a_later_record_of_the_same_iteration_counts() -> None:
    """After a crash a run repeats the iterations since its checkpoint."""
    found = arena_series([policy(0, reward=0.1), policy(1, reward=0.2), policy(1, reward=0.7)])
    assert found.tables["a"].column("reward").tolist() == [0.1, 0.7]


def test_null_and_absent_numbers_are_left_out_of_points() -> None:
    table = arena_series([policy(0, kl=None, reward=1.0), policy(1, kl=0.5), policy(2)]).tables["a"]
    x, y = table.points("kl")
    assert (x.tolist(), y.tolist()) == ([1.0], [0.5])
    assert math.isnan(table.last("never recorded"))
    assert math.isnan(table.recent("never recorded"))


def test_the_order_of_policies_is_the_runs() -> None:
    run: Record = {"at": 1.0, "kind": "run", "policies": "late, early", "task": "t", "seed": 3}
    found = arena_series([policy(0, "early"), policy(0, "copy"), run, policy(0, "late")])
    assert found.policies == ("late", "early", "copy")
    assert (found.facts.task, found.facts.seed, found.facts.sample) == ("t", "3", False)


def test_one_record_of_sample_data_makes_all_of_it_sample_data() -> None:
    assert arena_series([policy(0), {**policy(1), "sample": True}]).facts.sample
    assert not arena_series([policy(0), {**policy(1), "sample": False}]).facts.sample


def test_stretches_of_one_mode_are_bands_without_gaps() -> None:
    modes = ["x", "x", "y", "x"]
    found = arena_series([policy(i, mode=mode) for i, mode in enumerate(modes)])
    assert found.modes == (ModeSpan(-0.5, 1.5, "x"), ModeSpan(1.5, 2.5, "y"), ModeSpan(2.5, 3.5, "x"))


def test_the_final_evaluation_is_the_newest_against_each_opponent() -> None:
    head: Record = {"at": 1.0, "kind": "evaluation", "policy": "a"}
    records: list[Record] = [
        {**head, "iteration": 9, "opponent": "base", "score": 0.9, "low": 0.8, "high": 0.95},
        {**head, "iteration": 4, "opponent": "base", "score": 0.4},
        {**head, "iteration": 4, "opponent": "random", "win_rate": 1.0},
    ]
    final = arena_series(records).final_evaluations()
    assert {(found.opponent, found.score.value) for found in final if found.opponent == "base"} == {("base", 0.9)}
    assert [found.win.value for found in final if found.opponent == "random"] == [1.0]


def test_system_use_is_over_seconds_since_the_first_record() -> None:
    found = arena_series([policy(0), {"at": 130.5, "kind": "system", "cpu_percent": 40.0, "gpu_percent": None}])
    assert found.system.x.tolist() == [30.5]
    assert found.system.points("gpu_percent")[0].tolist() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_kind_leaves_the_rest(kind: str) -> None:
    found = arena_series(without(kind))
    assert found.policies == ("solver", "checker", "planner")
    tables = {"policy": found.tables["solver"], "credit": found.credit["solver"], "rating": found.rating["solver"]}
    tables |= {"team": found.team, "timing": found.timing, "system": found.system}
    assert [name for name, table in tables.items() if not len(table)] == ([kind] if kind in tables else [])


def test_no_records_is_an_error_that_says_what_came() -> None:
    with pytest.raises(NoRecordsError, match="got none"):
        arena_series([])
    with pytest.raises(NoRecordsError, match="push, step"):
        arena_series([{"at": 1.0, "kind": "step"}, {"at": 1.0, "kind": "push"}])


@given(st.lists(FINITE, min_size=1, max_size=40), st.floats(1, 50))
def test_an_average_stays_between_what_it_averages(values: list[float], span: float) -> None:
    average = smoothed(np.array(values), span)
    assert len(average) == len(values)
    assert average[0] == pytest.approx(values[0])
    for index, value in enumerate(average):
        so_far = values[: index + 1]
        assert min(so_far) - 1e-6 <= value <= max(so_far) + 1e-6


@given(st.integers(1, 1000))
def test_the_recent_values_are_some_but_not_most(count: int) -> None:
    assert 1 <= window(count) <= max(1, math.ceil(count / 3))


def test_an_average_over_one_value_changes_nothing() -> None:
    values = series_of().tables["solver"].column("reward")
    assert smoothed(values, 1.0) == pytest.approx(values)


def test_a_rate_is_that_of_the_sums_and_no_short_iteration_decides_it() -> None:
    seconds = [10.0] * 27 + [0.1] + [10.0] * 2
    records: list[Record] = [
        {"at": 1.0, "kind": "timing", "iteration": number, "tokens": 3000, "iteration_seconds": one}
        for number, one in enumerate(seconds)
    ]
    timing = arena_series(records).timing
    assert timing.rate("tokens", "iteration_seconds") == pytest.approx(6 * 3000 / 50.1)
    assert math.isnan(timing.rate("tokens", "nothing"))
    ratios: list[Record] = [
        {"at": 1.0, "kind": "policy", "policy": "a", "iteration": number, "tokens": tokens, "efficiency_token": ratio}
        for number, (tokens, ratio) in enumerate([(100, 1.0), (900, 2.0)] * 15)
    ]
    assert arena_series(ratios).tables["a"].weighted("efficiency_token", "tokens") == pytest.approx(1.9)


def test_who_is_the_best_is_known_as_recorded() -> None:
    leader: Record = {"at": 1.0, "kind": "leader", "policy": "a", "rival": "b", "iteration": 3, "apart": True}
    found = arena_series([{**leader, "apart": False}, leader]).leader
    assert found is not None
    assert (found.policy, found.rival, found.apart) == ("a", "b", True)
