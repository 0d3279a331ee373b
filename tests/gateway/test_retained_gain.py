"""Gain retained: shares of the own expert's gain, with intervals that cover what they should."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.gateway.losses import BASE, LossMatrix
from fedmoe.gateway.retained_gain import LEVEL, RetainedGains, retained_gains

OWN = {"sql": "sql_expert", "docs": "docs_expert"}


def matrix(seed: int = 0, blocks: int = 24, gain: float = 0.3, kept: float = 0.8, noise: float = 0.02) -> LossMatrix:
    """Blocks of very different difficulty; the gateway keeps `kept` of a gain that varies a little."""
    random = np.random.default_rng(seed)
    losses: dict[str, dict[str, list[float]]] = {name: {} for name in (BASE, "sql_expert", "docs_expert", "gateway")}
    tokens = {}
    for domain, own in OWN.items():
        hard = 3.0 + random.normal(0, 1.0, blocks)
        gains = gain + random.normal(0, noise, blocks)
        for name in losses:
            share = {own: 1.0, "gateway": kept}.get(name, 0.0)
            losses[name][domain] = (hard - share * gains + random.normal(0, 1e-3, blocks)).tolist()
        tokens[domain] = random.integers(100, 250, blocks).tolist()
    return LossMatrix.of_blocks(losses, tokens)


def test_the_share_is_base_minus_model_over_base_minus_own_expert() -> None:
    blocks = {
        BASE: {"sql": [2.0, 4.0]},
        "sql_expert": {"sql": [1.0, 3.0]},
        "gateway": {"sql": [1.5, 3.0]},
    }
    found = retained_gains(LossMatrix.of_blocks(blocks, {"sql": [30, 10]}), {"sql": "sql_expert"}, ["gateway"])
    assert found.domains[0].own_gain.value == pytest.approx(1.0)
    assert found.domains[0].retained["gateway"].value == pytest.approx((0.5 * 30 + 1.0 * 10) / 40)


def test_pairing_makes_intervals_far_narrower_than_blocks_differ() -> None:
    found = retained_gains(matrix(), OWN, ["gateway"])
    for domain in found.domains:
        share = domain.retained["gateway"]
        assert share.low < share.value < share.high
        assert share.high - share.low < 0.05
        assert share.value == pytest.approx(0.8, abs=0.02)
    assert found.warnings == []


def test_the_own_expert_keeps_all_and_the_base_nothing() -> None:
    found = retained_gains(matrix(), {"sql": "sql_expert"}, ["sql_expert", BASE])
    own, base = found.domains[0].retained["sql_expert"], found.domains[0].retained[BASE]
    assert (own.value, own.low, own.high) == pytest.approx((1.0, 1.0, 1.0))
    assert (base.value, base.low, base.high) == (0.0, 0.0, 0.0)


def test_worst_and_mean_are_over_domains() -> None:
    found = retained_gains(matrix(), OWN, ["gateway", "sql_expert"])
    summary = found.summaries["sql_expert"]
    assert summary.worst_domain == "docs"
    assert abs(summary.worst.value) < 0.05
    assert summary.mean.value == pytest.approx((1 + summary.worst.value) / 2)
    assert summary.mean.low < summary.mean.value < summary.mean.high
    values = [domain.retained["gateway"].value for domain in found.domains]
    assert found.summaries["gateway"].worst.value == min(values)


def test_a_gain_that_may_be_none_is_warned_of_and_left_out_of_the_summary() -> None:
    found = retained_gains(matrix(gain=0.0, noise=0.3), OWN, ["gateway"])
    assert len(found.warnings) == 2
    assert "may be none" in found.warnings[0]
    assert found.summaries == {}
    good, bad = matrix(), matrix(gain=-0.2)
    mixed = LossMatrix.of_blocks(
        {name: {"sql": good.block_losses[name]["sql"], "docs": bad.block_losses[name]["docs"]} for name in good.models},
        {"sql": good.block_tokens["sql"], "docs": bad.block_tokens["docs"]},
    )
    found = retained_gains(mixed, OWN, ["gateway"])
    assert [warning.split(":")[0] for warning in found.warnings] == ["docs"]
    assert found.summaries["gateway"].worst_domain == "sql"


def test_one_block_gives_no_interval() -> None:
    found = retained_gains(matrix(blocks=1), OWN, ["gateway"])
    assert math.isnan(found.domains[0].own_gain.low)
    assert "one held-out block" in found.warnings[0]


def test_the_same_seed_gives_the_same_intervals() -> None:
    def run(seed: int) -> RetainedGains:
        return retained_gains(matrix(), OWN, ["gateway"], seed=seed)

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_what_the_matrix_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="cobol_expert"):
        retained_gains(matrix(), {"sql": "cobol_expert"}, ["gateway"])
    with pytest.raises(ValueError, match=r"of cobol$"):
        retained_gains(matrix(), {"cobol": "sql_expert"}, ["gateway"])
    with pytest.raises(ValueError, match="no block losses of"):
        retained_gains(LossMatrix(matrix().losses, matrix().tokens), OWN, ["gateway"])


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(120):
        found = retained_gains(matrix(seed, noise=0.1, kept=0.7), {"sql": "sql_expert"}, ["gateway"], samples=400)
        gain = found.domains[0].own_gain
        covered += gain.low <= 0.3 <= gain.high
    assert 0.85 < covered / 120 <= 1.0
    assert LEVEL == 0.95


@settings(max_examples=25, deadline=None)
@given(st.floats(-1, 2), st.integers(0, 1000))
def test_a_model_between_base_and_expert_keeps_its_place(share: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    base, own = random.uniform(2, 4, 8), random.uniform(1, 1.9, 8)
    mixed = base + share * (own - base)
    blocks = {BASE: {"d": base.tolist()}, "d": {"d": own.tolist()}, "x": {"d": mixed.tolist()}}
    tokens = random.integers(1, 100, 8).tolist()
    kept = (
        retained_gains(LossMatrix.of_blocks(blocks, {"d": tokens}), {"d": "d"}, ["x"], samples=50)
        .domains[0]
        .retained["x"]
    )
    assert (kept.value, kept.low, kept.high) == pytest.approx((share, share, share), abs=1e-9)
