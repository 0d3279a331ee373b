"""The gate: the best worst domain goes out, and never one that is clearly worse than what is out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.server.gate.verdict import judge
from fedmoe.wire.contract.experts import GatewayScores


def scores(
    domain: str, kept: Mapping[str, float], evaluator: str = "w1", tokens: int = 1000, gain: float = 0.5
) -> GatewayScores:
    """What an evaluator reports when gateways keep these shares of a gain on a base loss of 3; "old" is published."""
    losses = {name: 3.0 - gain * share for name, share in kept.items()}
    return of_losses(domain, losses, evaluator, tokens, 3.0 - gain)


def of_losses(domain: str, losses: dict[str, float], evaluator: str, tokens: int, own: float) -> GatewayScores:
    return GatewayScores(
        set="0" * 16,
        evaluator=evaluator,
        expert=domain,
        tokens=tokens,
        base=3.0,
        own=own,
        published=losses.get("old"),
        candidates={name: loss for name, loss in losses.items() if name != "old"},
    )


def test_the_candidate_with_the_best_worst_domain_goes_out() -> None:
    given_scores = [
        scores("sql", {"old": 0.80, "even": 0.85, "uneven": 0.70}),
        scores("docs", {"old": 0.80, "even": 0.85, "uneven": 1.20}),
    ]
    verdict = judge(given_scores, ["even", "uneven"], published="old")
    assert verdict.serve == "even"
    assert "even keeps 85.0 %" in verdict.reason
    assert "old keeps 80.0 %" in verdict.reason
    assert verdict.retained["uneven"] == pytest.approx({"sql": 0.7, "docs": 1.2})


def test_a_worst_domain_may_fall_by_the_tolerance_and_no_more() -> None:
    given_scores = [scores("sql", {"old": 0.900, "new": 0.895}), scores("docs", {"old": 0.95, "new": 1.05})]
    assert judge(given_scores, ["new"], "old", tolerance=0.01).serve == "new"
    verdict = judge(given_scores, ["new"], "old", tolerance=0.001)
    assert verdict.serve == "old"
    assert "more than 0.1 % lower" in verdict.reason


def test_without_a_gateway_before_the_best_candidate_goes_out() -> None:
    verdict = judge([scores("sql", {"a": -0.5, "b": -0.2})], ["a", "b"])
    assert verdict.serve == "b"
    assert "none to compare with" in verdict.reason


def test_evaluators_of_a_domain_count_by_their_tokens() -> None:
    given_scores = [
        scores("sql", {"old": 0.5, "new": 1.0}, "w1", 300),
        scores("sql", {"old": 0.5, "new": 0.2}, "w2", 100),
    ]
    assert judge(given_scores, ["new"], "old").retained["new"]["sql"] == pytest.approx(0.8)


def test_a_claim_of_endless_tokens_does_not_decide_alone() -> None:
    honest = [scores("sql", {"old": 0.9, "new": 0.4}, f"w{number}", 100) for number in range(8)]
    loud = scores("sql", {"old": 0.9, "new": 1.0}, "loud", 10**9)
    assert judge([*honest, loud], ["new"], "old").serve == "old"


def test_scores_that_lack_a_gateway_are_not_compared() -> None:
    given_scores = [
        scores("sql", {"old": 0.8, "new": 0.9}),
        scores("sql", {"new": -5.0}, "w2"),
        scores("docs", {"old": 0.9, "another": 0.9}, "w3"),
    ]
    verdict = judge(given_scores, ["new"], "old")
    assert verdict.serve == "new"
    assert "not judged: docs" in verdict.reason
    none = judge(given_scores[1:], ["new"], "old")
    assert none.serve == "old"
    assert "nobody measured all of old, new" in none.reason


def test_a_gain_of_nothing_is_not_divided_by() -> None:
    given_scores = [scores("sql", {"old": 0.8, "new": 0.9}), scores("docs", {"old": 9.0, "new": -9.0}, gain=0.001)]
    verdict = judge(given_scores, ["new"], "old")
    assert (verdict.serve, set(verdict.retained["new"])) == ("new", {"sql"})
    nothing = judge(given_scores[1:], ["new"], "old")
    assert nothing.serve == "old"
    assert "no own expert gains" in nothing.reason


def test_an_own_expert_that_broke_does_not_excuse_its_domain() -> None:
    """The published gateway gains 0.4 there, the broken expert 0.001 or 0.02 and the new gateway as little."""
    fine = scores("sql", {"old": 0.9, "new": 1.0})
    for left in (0.001, 0.02):
        broken = of_losses("python", {"old": 2.6, "new": 3.0 - left}, "w2", 1000, 3.0 - left)
        verdict = judge([fine, broken], ["new"], "old")
        assert verdict.serve == "old"
        assert verdict.retained["old"]["python"] == 1.0
        assert "on its worst domain, python" in verdict.reason


def test_without_candidates_all_stays() -> None:
    assert judge([], [], "old").serve == "old"
    assert judge([], []).serve is None


@pytest.mark.parametrize(
    "wrong", [{"tokens": 0}, {"base": math.nan}, {"own": math.inf}, {"candidates": {"new": math.nan}}, {"base": -1.0}]
)
def test_numbers_that_are_none_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        GatewayScores.model_validate(scores("sql", {"new": 0.5}).model_dump() | wrong)


SHARES = st.lists(st.floats(-1, 2), min_size=3, max_size=3)


@settings(max_examples=60, deadline=None)
@given(SHARES, SHARES, SHARES, st.floats(0, 0.2))
def test_what_is_served_is_never_worse_than_the_tolerance_allows(
    old: list[float], one: list[float], two: list[float], tolerance: float
) -> None:
    rows = zip(("a", "b", "c"), old, one, two, strict=True)
    given_scores = [scores(domain, {"old": o, "one": x, "two": y}) for domain, o, x, y in rows]
    verdict = judge(given_scores, ["one", "two"], "old", tolerance)
    assert verdict.serve is not None
    worst = {name: min(kept.values()) for name, kept in verdict.retained.items()}
    assert worst[verdict.serve] >= worst["old"] - tolerance - 1e-9
    if max(worst["one"], worst["two"]) > worst["old"] + 1e-9:
        assert worst[verdict.serve] == max(worst["one"], worst["two"])
