"""Who answers a prompt, from what the router and the adapters say of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.gateway.routers import LEAST, MERGED_PRIOR, MOST, SEEN, TRUST, ExpertCandidates, candidates, choose

NAMES = ("art", "law", "music", "sport", "war")


def given_to(priors: dict[str, float], likelihoods: dict[str, float]) -> str:
    found = ExpertCandidates((1, 2), {name: math.log(prior) for name, prior in priors.items()})
    return choose(found, likelihoods, "gateway")


def test_the_likeliest_few_are_looked_at_again_the_best_first() -> None:
    found = candidates((5, 6), NAMES, np.array([0.2, 0.3, 0.05, 0.35, 0.1]))
    assert list(found.log_priors) == ["sport", "law", "art"]
    assert found.log_priors["law"] == pytest.approx(math.log(0.3))
    assert found.text == (5, 6)


def test_a_sure_router_leaves_one_and_one_that_knows_nothing_still_names_one() -> None:
    sure = candidates((5,), NAMES, np.array([LEAST / 2, 1 - LEAST / 2, 0.0, 0.0, 0.0]))
    assert list(sure.log_priors) == ["law"]
    many = [f"e{place:03}" for place in range(200)]
    assert len(candidates((5,), many, np.full(200, 1 / 200)).log_priors) == 1


def test_of_a_long_prompt_the_beginning_is_enough() -> None:
    assert candidates(range(1000), NAMES, np.full(5, 0.2)).text == tuple(range(SEEN))


def test_experts_that_look_alike_are_told_apart_by_how_well_they_explain_the_prompt() -> None:
    assert given_to({"law": 0.51, "war": 0.49}, {"law": -50.0, "war": -40.0}) == "war"
    assert given_to({"law": 0.51, "war": 0.49}, {"law": -40.0, "war": -40.0}) == "law"


def test_a_prompt_that_the_merged_adapter_explains_better_by_its_margin_is_the_merged_ones() -> None:
    margin = -math.log(MERGED_PRIOR) / TRUST
    assert given_to({"law": 1.0}, {"law": -40.0, "gateway": -40.0 + margin - 0.1}) == "law"
    assert given_to({"law": 1.0}, {"law": -40.0, "gateway": -40.0 + margin + 0.1}) == "gateway"


def test_without_a_merged_adapter_an_expert_answers() -> None:
    assert given_to({"law": 0.2, "war": 0.1}, {"law": -900.0, "war": -1000.0}) == "law"


def test_without_anything_to_explain_the_router_decides() -> None:
    nothing = dict.fromkeys(("law", "war", "gateway"), 0.0)
    assert given_to({"law": 0.9, "war": 0.1}, nothing) == "law"
    assert given_to({"law": 0.6, "war": 0.4}, nothing) == "gateway"


@given(
    st.lists(st.floats(0.001, 1.0), min_size=5, max_size=5),
    st.lists(st.floats(-500.0, -1.0), min_size=6, max_size=6),
    st.floats(-100.0, 100.0),
)
def test_what_all_explain_alike_changes_nothing(weights: list[float], found: list[float], common: float) -> None:
    likely = candidates((1, 2, 3), NAMES, np.array(weights) / sum(weights))
    assert 1 <= len(likely.log_priors) <= MOST
    likelihoods = dict(zip((*NAMES, "gateway"), found, strict=True))
    scores = sorted(
        [prior + TRUST * likelihoods[name] for name, prior in likely.log_priors.items()]
        + [math.log(MERGED_PRIOR) + TRUST * likelihoods["gateway"]]
    )
    moved = {name: value + common for name, value in likelihoods.items()}
    if scores[-1] - scores[-2] > 1e-6:
        assert choose(likely, moved, "gateway") == choose(likely, likelihoods, "gateway")


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_a_likelihood_that_is_none_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match=r"none of .'gateway'"):
        given_to({"law": 0.6}, {"law": -3.0, "gateway": wrong})
    with pytest.raises(ValueError, match=r"none of .'war'"):
        given_to({"law": 0.6, "war": 0.4}, {"law": -3.0, "gateway": -2.0})
