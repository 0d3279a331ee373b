"""Whose doing it was (E11): what every rule pays, and rules of installed packages (E21)."""

from __future__ import annotations

from collections import Counter
from importlib.metadata import EntryPoint, EntryPoints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.arena.modes.credit import Credit, CreditError, SeatCredit, credit_rule, decompose, weighted_rule
from fedmoe.arena.tasks.task import Lineup, Outcome, Team
from fedmoe.runtime import plugins

RULES = {
    "individual": weighted_rule(Credit(individual=1.0)),
    "shared": weighted_rule(Credit(shared=1.0)),
    "difference": weighted_rule(Credit(difference=1.0)),
    "team_advantage": weighted_rule(Credit(versus=1.0)),
}
laws = settings(deadline=None, max_examples=60)
scores = st.floats(0, 1)


def vote(answers: tuple[str, ...], lineup: Lineup, truth: str = "right") -> Outcome:
    """A majority vote a team, ties to the earlier answer, scored again without each seat."""

    def joint(seats: tuple[int, ...]) -> float:
        counts = Counter(answers[seat] for seat in seats)
        return float(bool(counts) and counts.most_common(1)[0][0] == truth)

    teams = [team.seats for team in lineup.teams]
    without = {seat: joint(tuple(s for s in team if s != seat)) for team in teams for seat in team}
    own = tuple(float(answer == truth) for answer in answers)
    return Outcome(own, tuple(map(joint, teams)), (1.0,) * len(answers), without=without)


def rewards(found: tuple[SeatCredit, ...]) -> list[float]:
    return [seat.reward for seat in found]


@st.composite
def played(draw: st.DrawFn, equal: bool = False) -> tuple[Outcome, Lineup]:
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    if equal:
        sizes = [sizes[0]] * len(sizes)
    order = draw(st.permutations(range(sum(sizes))))
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    teams = tuple(Team(tuple(order[start : start + size])) for start, size in zip(starts, sizes, strict=True))
    seats = tuple(draw(st.lists(scores, min_size=sum(sizes), max_size=sum(sizes))))
    joint = tuple(draw(st.lists(scores, min_size=len(sizes), max_size=len(sizes))))
    without = {seat: draw(scores) for seat in range(sum(sizes))}
    return Outcome(seats, joint, (1.0,) * sum(sizes), without=without), Lineup(teams)


@laws
@given(st.lists(st.sampled_from(["right", "wrong", "other"]), min_size=1, max_size=7))
def test_a_mate_whose_removal_never_changes_the_vote_earns_no_difference(answers: list[str]) -> None:
    lineup = Lineup.together(len(answers))
    outcome = vote(tuple(answers), lineup)
    useless = [seat for seat in range(len(answers)) if outcome.without[seat] == outcome.team_scores[0]]
    found = rewards(RULES["difference"](outcome, lineup))
    assert all(found[seat] == 0 for seat in useless)
    assert all(abs(found[seat]) == 1 for seat in range(len(answers)) if seat not in useless)


def test_the_free_rider_shares_the_win_but_makes_no_difference() -> None:
    lineup = Lineup.together(4)
    outcome = vote(("right", "right", "wrong", "wrong"), lineup)
    assert rewards(RULES["shared"](outcome, lineup)) == [1, 1, 1, 1]
    assert rewards(RULES["individual"](outcome, lineup)) == [1, 1, 0, 0]
    assert rewards(RULES["difference"](outcome, lineup)) == [1, 1, 0, 0]


def test_who_makes_his_team_lose_pays_for_it() -> None:
    lineup = Lineup.together(3)
    outcome = vote(("wrong", "right", "wrong"), lineup)
    assert rewards(RULES["difference"](outcome, lineup)) == [-1, 0, 0]


@laws
@given(played(equal=True))
def test_between_teams_of_equal_size_the_advantages_sum_to_zero(case: tuple[Outcome, Lineup]) -> None:
    assert sum(rewards(RULES["team_advantage"](*case))) == pytest.approx(0, abs=1e-9)


@laws
@given(played())
def test_between_teams_of_any_size_the_advantages_sum_to_zero_over_teams(case: tuple[Outcome, Lineup]) -> None:
    found = rewards(RULES["team_advantage"](*case))
    assert sum(found[team.seats[0]] for team in case[1].teams) == pytest.approx(0, abs=1e-9)


@laws
@given(played(), st.sampled_from(["shared", "team_advantage"]))
def test_joint_rules_reward_mates_alike(case: tuple[Outcome, Lineup], name: str) -> None:
    found = rewards(RULES[name](*case))
    assert all(len({found[seat] for seat in team.seats}) == 1 for team in case[1].teams)


@laws
@given(played(), *[st.floats(-2, 2).filter(lambda weight: weight == 0 or abs(weight) > 1e-3)] * 4)
def test_a_weighted_reward_is_the_sum_of_its_parts(
    case: tuple[Outcome, Lineup], own: float, joint: float, missed: float, ahead: float
) -> None:
    if not any((own, joint, missed, ahead)):
        return
    singles = [rewards(RULES[name](*case)) for name in ("individual", "shared", "difference", "team_advantage")]
    found = weighted_rule(Credit(own, joint, missed, ahead))(*case)
    for seat, credited in enumerate(found):
        expected = sum(w * single[seat] for w, single in zip((own, joint, missed, ahead), singles, strict=True))
        assert credited.reward == pytest.approx(expected, abs=1e-9)
        parts = credited.parts.parts()
        assert list(parts) == ["individual", "shared", "difference", "versus"]
        assert list(parts.values()) == [single[seat] for single in singles]


@laws
@given(played())
def test_every_rule_reports_the_same_parts(case: tuple[Outcome, Lineup]) -> None:
    parts = decompose(*case)
    for name in ("individual", "shared", "difference", "team_advantage"):
        assert tuple(seat.parts for seat in RULES[name](*case)) == parts


def test_a_part_without_a_number_is_reported_as_none_and_never_rewarded() -> None:
    lineup = Lineup.together(2)
    outcome = Outcome((1.0, 0.0), (1.0,), (1.0, 1.0), without={0: 0.0})
    assert decompose(outcome, lineup) == (Credit(1.0, 1.0, 1.0, None), Credit(0.0, 1.0, None, None))
    with pytest.raises(CreditError, match="seat 1 has no difference"):
        RULES["difference"](outcome, lineup)
    with pytest.raises(CreditError, match="seat 0 has no versus: there is no rival"):
        RULES["team_advantage"](outcome, lineup)
    assert rewards(RULES["shared"](outcome, lineup)) == [1, 1]


@pytest.mark.parametrize("outcome", [Outcome((1.0,), (1.0,), (1.0,)), Outcome((1.0, 0.0), (1.0,), (1.0, 1.0))])
def test_an_outcome_of_another_line_up_is_refused(outcome: Outcome) -> None:
    with pytest.raises(CreditError, match="2 seats in 2 teams"):
        decompose(outcome, Lineup.alone(2))


@pytest.mark.parametrize("weights", [Credit(), Credit(shared=float("nan")), Credit(shared=1.0, versus=None)])
def test_weights_that_reward_nothing_are_refused(weights: Credit) -> None:
    with pytest.raises(CreditError, match="finite numbers"):
        weighted_rule(weights)


def installed(monkeypatch: pytest.MonkeyPatch, *points: tuple[str, str]) -> None:
    found = EntryPoints(EntryPoint(name, value, "fedmoe.credit") for name, value in points)
    monkeypatch.setattr(plugins, "entry_points", lambda group: found.select(group=group))


def test_a_rule_is_found_by_name_in_an_installed_package(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(
        monkeypatch, ("foreign", "fedmoe.arena.modes.credit:decompose"), ("odd", "fedmoe.arena.modes.credit:__name__")
    )
    foreign: object = credit_rule("foreign")
    assert foreign is decompose
    with pytest.raises(CreditError, match=r"'odd' .* is a str"):
        credit_rule("odd")
    with pytest.raises(CreditError, match=r"'nothing' is not known; there are: foreign, odd"):
        credit_rule("nothing")


def test_a_rule_that_two_packages_bring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, ("shared", "somewhere:rule"), ("shared", "elsewhere:rule"))
    with pytest.raises(CreditError, match="more than once"):
        credit_rule("shared")
