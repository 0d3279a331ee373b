"""Which gateways are offered for scoring, when a set is judged, and what the scores then say."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import MANIFEST, make_adapter, make_flat

from fedmoe.coordinator import Aggregation, GatewayModel
from fedmoe.experts import ExpertModel
from fedmoe.lora.update_rules import RuleState
from fedmoe.server.gate.candidates import (
    Candidate,
    CandidateSet,
    Evaluator,
    decide,
    make_candidates,
    offered,
    outcome,
    waiting_for,
)
from fedmoe.wire.contract.experts import MAX_CANDIDATES, GatewayScores


def expert(name: str, seed: int) -> ExpertModel:
    return ExpertModel(name, MANIFEST, 3, RuleState(make_flat(seed), (), 3))


EXPERTS = {"python": expert("python", 1), "sql": expert("sql", 2)}


def products(gateway: GatewayModel) -> dict[str, np.ndarray]:
    scale = gateway.adapter.scale
    return {module.name: scale * b.astype(np.float64) @ a for module, a, b in gateway.adapter.factors()}


# What is offered.


@pytest.mark.parametrize(
    ("strategy", "scales"),
    [
        ("weighted_average", (1 / 3, 0.4, 0.6, 0.8)),
        ("sum", (0.4, 0.6, 0.8, 1.0)),
        ("concat", (0.4, 0.6, 0.8, 1.0)),
        ("scaled", (0.4, 0.6, 0.8)),
    ],
)
def test_the_strategy_asked_for_is_a_scale_of_the_stack(strategy: str, scales: tuple[float, ...]) -> None:
    found = offered(Aggregation(strategy=strategy), 3, with_moments=False)
    assert found == [("scaled", scales)]


def test_regmean_is_offered_where_every_expert_has_moments() -> None:
    assert [name for name, _ in offered(Aggregation(), 2, True)] == ["scaled", "regmean"]
    assert [name for name, _ in offered(Aggregation(strategy="regmean"), 2, False)] == ["scaled"]


@given(st.sampled_from(["weighted_average", "sum", "scaled", "regmean"]), st.integers(1, 50), st.booleans())
def test_no_set_is_too_large_to_be_scored(strategy: str, count: int, with_moments: bool) -> None:
    found = offered(Aggregation(strategy=strategy), count, with_moments)
    assert 1 <= sum(len(scales) for _, scales in found) <= MAX_CANDIDATES
    assert all(scale > 0 for _, scales in found for scale in scales)


def test_one_expert_alone_is_the_only_candidate() -> None:
    (candidate,) = make_candidates(4, {"sql": EXPERTS["sql"]}, Aggregation(strategy="weighted_average"), {})
    for name, product in products(candidate.gateway()).items():
        a, b = EXPERTS["sql"].adapter.module(name)
        np.testing.assert_allclose(product, EXPERTS["sql"].adapter.scale * b @ a, rtol=1e-5, atol=1e-9)


def test_candidates_of_a_strategy_share_its_adapter_and_differ_by_the_scale() -> None:
    candidates = make_candidates(7, EXPERTS, Aggregation(strategy="weighted_average"), {})
    assert len({candidate.model.digest for candidate in candidates}) == 1
    assert len({candidate.gateway().digest for candidate in candidates}) == len(candidates)
    average = GatewayModel.build(7, EXPERTS, Aggregation(strategy="weighted_average"))
    half = next(candidate.gateway() for candidate in candidates if candidate.scale == 0.5)
    assert (half.scale, half.version, half.strategy) == (0.5, 7, "scaled")
    assert half.adapter.alpha == half.adapter.rank
    for name, product in products(half).items():
        np.testing.assert_allclose(product, products(average)[name], rtol=1e-5, atol=1e-9)


# When a set is judged.

A: Evaluator = ("e1", "python")
B: Evaluator = ("e2", "sql")


@pytest.mark.parametrize(
    ("now", "scored", "heard", "expected"),
    [
        (5.0, set(), {A: 4.0}, "wait"),
        (5.0, {A}, {A: 4.0}, "judge"),
        (5.0, {A}, {A: 4.0, B: 4.5}, "wait"),
        (5.0, {A, B}, {A: 4.0, B: 4.5}, "judge"),
        (10.0, {A}, {A: 4.0, B: 9.5}, "undecided"),  # time is over, and B has not scored
        (10.0, {A}, {A: 4.0, B: 0.5}, "undecided"),  # however long B has been busy with it
        (10.0, {A}, {A: 4.0, B: -9.5}, "undecided"),  # B asked shortly before the set was made
        (10.0, set(), {A: 4.0}, "undecided"),
        (9.0, {A}, {A: 4.0, B: -10.0}, "judge"),  # B was last heard of a whole time before
        (10.0, {A, B}, {A: 4.0, B: 4.5}, "judge"),  # all are there, if only just
        (9.0, set(), {}, "wait"),
    ],
)
def test_a_set_is_judged_once_all_who_are_active_have_scored_and_never_by_the_clock(
    now: float, scored: set[Evaluator], heard: Mapping[Evaluator, float], expected: str
) -> None:
    assert outcome(0.0, now, 10.0, scored, heard) == expected


@given(
    st.floats(0, 100), st.sets(st.sampled_from([A, B])), st.dictionaries(st.sampled_from([A, B]), st.floats(-50, 100))
)
def test_no_set_stays_open_beyond_its_time_and_none_is_judged_without_all_scores(
    now: float, scored: set[Evaluator], heard: Mapping[Evaluator, float]
) -> None:
    found, missing = outcome(0.0, now, 10.0, scored, heard), waiting_for(0.0, 10.0, scored, heard)
    assert (found == "wait") <= (now < 10.0)
    assert (found == "judge") == (bool(scored) and not missing)


# What the scores say.


def offer(published: GatewayModel | None = None) -> CandidateSet:
    made = GatewayModel.build(9, EXPERTS, Aggregation(strategy="sum"))
    candidates = (Candidate("scaled x0.4", made, 0.4), Candidate("scaled x0.6", made, 0.6))
    return CandidateSet("0" * 16, 0.0, 9, EXPERTS, candidates, published)


def scores(domain: str, low: float, high: float, published: float | None = None) -> GatewayScores:
    """Losses where the base model has 3, the own expert 2."""
    return GatewayScores(
        set="0" * 16,
        evaluator=f"e-{domain}",
        expert=domain,
        tokens=100,
        base=3.0,
        own=2.0,
        published=published,
        candidates={"scaled x0.4": low, "scaled x0.6": high},
    )


OLD = GatewayModel.build(4, {"python": EXPERTS["python"]}, Aggregation())


def test_the_scale_with_the_best_worst_domain_goes_out() -> None:
    verdict = decide(offer(), [scores("python", 2.3, 2.1), scores("sql", 2.3, 2.6)], 0.01)
    assert verdict.serve == "scaled x0.4"
    assert "70.0 %" in verdict.reason


def test_a_worse_gateway_stays_inside_and_the_reason_names_both() -> None:
    verdict = decide(offer(OLD), [scores("python", 2.3, 2.1, 2.2), scores("sql", 2.9, 2.9, 2.2)], 0.01)
    assert verdict.serve == "version 4"
    assert "sql, but version 4 keeps 80.0 %" in verdict.reason


def test_what_was_taken_back_does_not_hold_its_place() -> None:
    given_scores = [scores("python", 2.5, 2.6, 2.1), scores("sql", 2.5, 2.6, 2.1)]
    assert decide(offer(OLD), given_scores, 0.01).serve == "version 4"
    verdict = decide(offer(OLD), given_scores, 0.01, taken_back=["python"])
    assert verdict.serve == "scaled x0.4"
    assert "version 4 does not count: it holds what was taken back from python" in verdict.reason


def test_experts_without_an_evaluator_are_named() -> None:
    verdict = decide(offer(), [scores("python", 2.3, 2.1)], 0.01)
    assert (verdict.serve, verdict.reason.endswith("without an evaluator's scores: sql")) == ("scaled x0.6", True)


def test_an_adapter_of_scale_one_is_not_copied() -> None:
    made = GatewayModel.build(9, EXPERTS, Aggregation(strategy="sum"))
    assert Candidate("scaled x1", made, 1.0).gateway() is made
    assert make_adapter(1).alpha != make_adapter(1).rank  # so that a wrong scale would show above
