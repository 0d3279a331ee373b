"""Mixed mode (E5): every mode is tried, noise does not make it flap, and every decision says why in numbers."""

from __future__ import annotations

import json
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.arena.modes.switching import (
    COMPETITIVE,
    COOPERATIVE,
    MODES,
    TEAM_BATTLE,
    Measurement,
    ModeSwitch,
    SwitchDecision,
    SwitchRules,
    agreement,
)
from fedmoe.runtime.saved_state import restored, saved_state

RULES = SwitchRules(exploration=12, min_stay=6, window=6)


def run(switch: ModeSwitch, gains: dict[str, float], iterations: int, score: float = 0.0) -> list[SwitchDecision]:
    """Every mode moves the score by its own gain an iteration."""
    decisions = []
    for _ in range(iterations):
        score += gains[switch.mode]
        decisions.append(switch.step(Measurement(score, "ann", -1.0, 0.5)))
    return decisions


def at(mode: str, rules: SwitchRules = RULES) -> ModeSwitch:
    """A switch that explored nothing and plays `mode`."""
    others = [other for other in MODES if other != mode]
    return ModeSwitch((mode, *others), SwitchRules(0, rules.min_stay, rules.window, agreement=rules.agreement))


measurements = st.builds(Measurement, st.floats(0, 1), st.just("ann"), st.floats(-5, 5), st.floats(0, 1))


@settings(max_examples=100, deadline=None)
@given(st.lists(measurements, max_size=150), st.integers(1, 12))
def test_whatever_is_measured_a_mode_stays_for_its_least_time(seen: list[Measurement], min_stay: int) -> None:
    switch = ModeSwitch(rules=SwitchRules(exploration=9, min_stay=min_stay, window=5))
    switches = [decision.iteration for decision in map(switch.step, seen) if decision.switched]
    later = [iteration for iteration in switches if iteration >= 9]
    assert all(second - first >= min_stay for first, second in pairwise(later))
    assert len(later) <= len(seen) / min_stay + 1


@settings(max_examples=60, deadline=None)
@given(st.lists(measurements, min_size=20, max_size=20), st.integers(3, 20))
def test_exploration_visits_every_mode_whatever_happens(seen: list[Measurement], exploration: int) -> None:
    switch, visited = ModeSwitch(rules=SwitchRules(exploration=exploration)), []
    for measured in seen[:exploration]:
        visited.append(switch.mode)
        switch.step(measured)
    assert set(visited) == set(MODES)
    counts = [visited.count(mode) for mode in MODES]
    assert max(counts) - min(counts) <= 1


@settings(max_examples=40, deadline=None)
@given(st.lists(measurements, min_size=40, max_size=80))
def test_every_reason_carries_numbers_and_every_decision_follows_the_last(seen: list[Measurement]) -> None:
    switch = ModeSwitch(rules=RULES)
    before = switch.mode
    for iteration, measured in enumerate(seen, start=1):
        decision = switch.step(measured)
        assert (decision.iteration, decision.before, decision.after) == (iteration, before, switch.mode)
        assert re.search(r"\d", decision.reason)
        before = decision.after


def test_after_exploration_the_mode_that_helps_most_is_found_and_kept() -> None:
    switch = ModeSwitch(rules=RULES)
    gains = {COOPERATIVE: 0.002, COMPETITIVE: 0.01, TEAM_BATTLE: 0.003}
    decisions = run(switch, gains, 60)
    assert {decision.after for decision in decisions[25:]} == {COMPETITIVE}
    (found,) = [decision for decision in decisions[12:] if decision.switched]
    assert found.trigger == "progress"
    assert "+0.0030" in found.reason
    assert "+0.0100" in found.reason


def test_equal_modes_under_noise_with_a_rising_score_are_rarely_changed() -> None:
    """Slopes tremble by less than the margin; only the least stay and the margin together keep it calm."""
    switches = 0
    for seed in range(10):
        rng, switch = np.random.default_rng(seed), ModeSwitch(rules=SwitchRules(15, 5, 10, margin=0.004))
        for iteration in range(200):
            noise = float(rng.normal(0, 0.005))
            decision = switch.step(Measurement(0.003 * iteration + noise, "ann", -1.0, 0.5))
            switches += decision.switched and iteration >= 15
    assert switches / 10 <= 4


def test_on_a_plateau_the_mode_that_rested_longest_comes_next() -> None:
    decisions = run(ModeSwitch(rules=RULES), dict.fromkeys(MODES, 0.0), 40, score=0.4)
    later = [decision for decision in decisions[12:] if decision.switched]
    assert [decision.after for decision in later[:3]] == [COOPERATIVE, COMPETITIVE, TEAM_BATTLE]
    assert {decision.trigger for decision in later} == {"plateau"}
    assert "+0.0000" in later[0].reason
    assert "0.001" in later[0].reason


def test_a_dominant_policy_ends_the_competition_until_it_is_caught_up_with() -> None:
    switch = at(COMPETITIVE)
    decisions = [switch.step(Measurement(0.01 * step, "ann", 2.5, 0.5)) for step in range(6)]
    assert [decision.switched for decision in decisions] == [False] * 5 + [True]
    assert decisions[-1].trigger == "dominance"
    assert decisions[-1].after in (TEAM_BATTLE, COOPERATIVE)
    assert "ann" in decisions[-1].reason
    assert "2.50" in decisions[-1].reason
    plateaus = [switch.step(Measurement(0.5, "ann", 2.5, 0.5)).after for _ in range(60)]
    assert set(plateaus) == {TEAM_BATTLE, COOPERATIVE}
    free = [switch.step(Measurement(0.5, "ann", -3.0, 0.5)).after for _ in range(60)]
    assert COMPETITIVE in free


def test_lost_diversity_leads_to_a_mode_where_it_pays_to_differ() -> None:
    switch = at(TEAM_BATTLE)
    decisions = [switch.step(Measurement(0.01 * step, "ann", -1.0, 0.95)) for step in range(6)]
    assert decisions[-1].switched
    assert decisions[-1].trigger == "diversity"
    assert decisions[-1].after in (COMPETITIVE, COOPERATIVE)
    assert "0.95" in decisions[-1].reason


def test_agreement_is_the_share_of_pairs_that_answer_alike() -> None:
    assert agreement([["4", "4", "4"], ["7", "7", "7"]]) == 1.0
    assert agreement([["4", "5", "6"]]) == 0.0
    assert agreement([["4", "4", "6"], ["1", "1", "1"]]) == pytest.approx((1 / 3 + 1) / 2)
    for answers in ([], [["4"]]):
        with pytest.raises(ValueError, match="two or more"):
            agreement(answers)


def test_both_troubles_together_leave_cooperation() -> None:
    for start in (TEAM_BATTLE, COMPETITIVE):
        switch = at(start)
        for step in range(30):
            switch.step(Measurement(0.01 * step, "ann", 2.5, 0.95))
        assert switch.mode == COOPERATIVE


@pytest.mark.parametrize(("start", "limit", "barred"), [(TEAM_BATTLE, "agreement", 2), (COMPETITIVE, "lead", 1)])
def test_a_measure_that_trembles_at_its_limit_does_not_tremble_the_decision(
    start: str, limit: str, barred: int
) -> None:
    """The score stands still: the plateau wants another mode again and again, and never gets the barred one."""
    rng, switch, after = np.random.default_rng(0), at(start), []
    for step in range(150):
        tremble = float(rng.uniform(-0.03, 0.0)) if step else 0.01
        lead, alike = (tremble, 0.5) if limit == "lead" else (-1.0, 0.9 + tremble)
        after.append(switch.step(Measurement(0.5, "ann", lead, alike)).after)
    assert MODES[barred] == start
    assert start not in after[10:]


def test_a_mode_that_was_better_by_less_than_the_margin_is_no_reason_to_leave() -> None:
    gains = {COOPERATIVE: 0.0110, COMPETITIVE: 0.0100, TEAM_BATTLE: 0.0105}
    calm = run(ModeSwitch(rules=RULES), gains, 80)
    assert {decision.after for decision in calm[12:]} == {TEAM_BATTLE}
    eager = run(ModeSwitch(rules=SwitchRules(12, 6, 6, margin=0.0)), gains, 80)
    assert eager[-1].after == COOPERATIVE


def test_only_the_last_scores_of_a_stay_tell_whether_it_still_helps() -> None:
    switch = at(TEAM_BATTLE)
    rising = [switch.step(Measurement(0.02 * step, "ann", -1.0, 0.5)) for step in range(30)]
    assert not any(decision.switched for decision in rising)
    flat = [switch.step(Measurement(0.6, "ann", -1.0, 0.5)) for _ in range(8)]
    (left,) = [decision for decision in flat if decision.switched]
    assert left.trigger == "plateau"


def test_a_checkpoint_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    switch = ModeSwitch(rules=RULES)
    seen = [Measurement(float(rng.random()), "ann", float(rng.normal()), float(rng.random())) for _ in range(80)]
    for measured in seen[:37]:
        switch.step(measured)
    again = restored(ModeSwitch, json.loads(json.dumps(saved_state(switch))))
    assert [again.step(measured) for measured in seen[37:]] == [switch.step(measured) for measured in seen[37:]]
    assert again == switch


def test_rules_and_measurements_that_cannot_be_used_are_refused() -> None:
    with pytest.raises(ValueError, match="min_stay"):
        SwitchRules(min_stay=0)
    with pytest.raises(ValueError, match="agreement"):
        SwitchRules(agreement=1.5)
    with pytest.raises(ValueError, match="two or more"):
        ModeSwitch((COOPERATIVE,), RULES)
    with pytest.raises(ValueError, match="cannot visit 3"):
        ModeSwitch(rules=SwitchRules(exploration=2))
    with pytest.raises(ValueError, match="finite"):
        Measurement(float("nan"), "ann", 0.0, 0.5)
