from __future__ import annotations

import math
from dataclasses import asdict, fields, replace
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import LossName, computed, fresh, part, random_tokens
from pydantic import ValidationError

from fedmoe.arena.learning.config import LossConfig
from fedmoe.arena.learning.loss import (
    AGGREGATIONS,
    GAP_ALARM,
    GAP_TARGET,
    LOSSES,
    LossError,
    LossTokens,
    combined,
    gap_alarm,
)

laws = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31)
losses = st.sampled_from(sorted(LOSSES))
configs = st.builds(
    LossConfig,
    loss=losses,
    clip_low=st.sampled_from([0.05, 0.1, 0.2]),
    clip_high=st.sampled_from([0.2, 0.28]),
)


def single(current: float, advantage: float, proximal: float = 0.0, behaviour: float = 0.0) -> LossTokens:
    numbers = torch.tensor([current, proximal, behaviour, advantage, 1.0], dtype=torch.float64)
    leaf, before, sampled, value, weight = numbers.reshape(5, 1)
    return LossTokens(leaf.clone().requires_grad_(), before, sampled, value, torch.tensor([True]), weight)


@laws
@given(seeds, configs)
def test_decoupled_is_clipped_where_the_proximal_weights_sampled(seed: int, config: LossConfig) -> None:
    drawn = random_tokens(seed)
    tokens = replace(drawn, proximal=drawn.behaviour)
    left = computed(tokens, replace(config, loss="decoupled"), 7.0)
    right = computed(tokens, replace(config, loss="clipped"), 7.0)
    assert left[0] == pytest.approx(right[0], abs=1e-12)
    torch.testing.assert_close(left[1], right[1])
    assert asdict(left[2]) == pytest.approx(asdict(right[2]))


@laws
@given(seeds, configs)
def test_no_advantage_teaches_nothing(seed: int, config: LossConfig) -> None:
    drawn = random_tokens(seed)
    tokens = replace(drawn, advantages=torch.zeros_like(drawn.advantages))
    loss, gradient, _ = computed(tokens, config, 5.0)
    assert loss == 0
    assert not gradient.any()


@laws
@given(seeds, configs, st.integers(1, 23))
def test_micro_batches_add_up_to_the_whole(seed: int, config: LossConfig, cut: int) -> None:
    tokens = random_tokens(seed)
    whole = computed(tokens, config, 17.0)
    leaf = fresh(tokens)
    parts = [LOSSES[config.loss](part(leaf, *ends), config, 17.0) for ends in ((0, cut), (cut, 24))]
    for loss, _ in parts:
        loss.backward()
    assert sum(loss.item() for loss, _ in parts) == pytest.approx(whole[0], abs=1e-12)
    torch.testing.assert_close(leaf.current.grad, whole[1])
    assert asdict(combined([statistics for _, statistics in parts])) == pytest.approx(asdict(whole[2]))


@laws
@given(seeds, configs)
def test_tokens_off_the_mask_have_no_effect_whatever_they_hold(seed: int, config: LossConfig) -> None:
    tokens = random_tokens(seed)
    off = ~tokens.mask

    def spoilt(tensor: torch.Tensor, value: float) -> torch.Tensor:
        return torch.where(off, value, tensor.detach())

    spoiled = LossTokens(
        current=spoilt(tokens.current, -math.inf).requires_grad_(),
        proximal=spoilt(tokens.proximal, math.nan),
        behaviour=spoilt(tokens.behaviour, -math.inf),
        advantages=spoilt(tokens.advantages, math.nan),
        mask=tokens.mask,
        weights=spoilt(tokens.weights, math.inf),
    )
    clean, dirty = computed(tokens, config, 9.0), computed(spoiled, config, 9.0)
    assert dirty[0] == clean[0]
    assert torch.equal(dirty[1], clean[1])
    assert dirty[2] == clean[2]
    assert not dirty[1][off].any()


@laws
@given(seeds)
def test_the_gradient_of_reinforce_is_the_advantage_of_every_token(seed: int) -> None:
    tokens = random_tokens(seed)
    _, gradient, statistics = computed(tokens, LossConfig("reinforce"), 11.0)
    torch.testing.assert_close(gradient, -tokens.advantages * tokens.weights * tokens.mask / 11.0)
    assert statistics.clip_fraction == 0
    assert statistics.importance_weight == 1


@laws
@given(seeds, st.sampled_from(["clipped", "decoupled"]))
def test_on_policy_every_loss_has_the_gradient_of_reinforce(seed: int, name: LossName) -> None:
    drawn = random_tokens(seed)
    there = drawn.current.detach()
    tokens = replace(drawn, proximal=there, behaviour=there)
    torch.testing.assert_close(
        computed(tokens, LossConfig(name), 3.0)[1], computed(tokens, LossConfig("reinforce"), 3.0)[1]
    )


@pytest.mark.parametrize(
    ("ratio", "advantage", "learns"),
    [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False), (1.1, 1.0, True), (0.9, -1.0, True)],
)
def test_the_clip_stops_only_what_goes_further_away(ratio: float, advantage: float, learns: bool) -> None:
    tokens = single(math.log(ratio), advantage)
    for name in ("clipped", "decoupled"):
        _, gradient, statistics = computed(tokens, LossConfig(name), 1.0)
        assert gradient.item() == pytest.approx(-advantage * ratio if learns else 0.0)
        assert statistics.clip_fraction == (not learns)


@pytest.mark.parametrize(("ratio", "advantage"), [(2.0, 1.0), (2.0, -1.0), (0.5, 1.0), (0.5, -1.0)])
def test_the_two_bounds_of_the_clip_are_apart(ratio: float, advantage: float) -> None:
    loss, _, _ = computed(single(math.log(ratio), advantage), LossConfig("clipped", clip_low=0.1, clip_high=0.3), 1.0)
    counted = min(ratio, 1.3) if advantage > 0 else max(ratio, 0.9)
    assert loss == pytest.approx(-advantage * counted)


def test_a_token_beyond_the_cap_leaves_the_sum_but_not_the_denominator() -> None:
    """Two tokens, behaviour weights 6 and 1.5, and a cap of 5."""
    proximal = torch.log(torch.tensor([6.0, 1.5], dtype=torch.float64))
    zeros = torch.zeros(2, dtype=torch.float64)
    ones = torch.ones(2, dtype=torch.float64)
    tokens = LossTokens(proximal.clone().requires_grad_(), proximal, zeros, ones, ones.bool(), ones)
    loss, gradient, statistics = computed(tokens, LossConfig("decoupled"), 2.0)
    assert loss == pytest.approx(-1.5 / 2)
    assert gradient.tolist() == pytest.approx([0.0, -0.75])
    assert statistics.masked_fraction == 0.5
    assert statistics.importance_weight == pytest.approx(1.5)


def test_the_statistics_are_what_they_say() -> None:
    tokens = LossTokens(
        current=torch.tensor([-1.0, -2.0, -3.0], requires_grad=True),
        proximal=torch.tensor([-1.5, -2.0, -9.0]),
        behaviour=torch.tensor([-1.0, -2.1, -1.0]),
        advantages=torch.tensor([1.0, 1.0, 1.0]),
        mask=torch.tensor([True, True, False]),
        weights=torch.ones(3),
    )
    _, _, statistics = computed(tokens, LossConfig(), 2.0)
    assert statistics.tokens == 2
    assert statistics.gap_mean == pytest.approx(0.3)
    assert statistics.gap_max == pytest.approx(0.5)
    assert statistics.kl_k1 == pytest.approx(-0.25)
    assert statistics.kl_k3 == pytest.approx((math.exp(0.5) - 1 - 0.5) / 2, rel=1e-6)
    assert statistics.clip_fraction == 0.5


@pytest.mark.parametrize(
    ("name", "weights", "denominator"),
    [("token_mean", (1, 1, 1), 6), ("sequence_mean", (0.5, 1, 0.25), 3), ("constant", (1, 1, 1), 24)],
)
def test_an_aggregation_says_what_a_token_weighs(name: str, weights: tuple[float, ...], denominator: float) -> None:
    lengths = [2, 0, 4]
    aggregation = AGGREGATIONS[name](lengths, 8)
    assert aggregation.weights == weights
    assert aggregation.denominator == denominator


def test_an_aggregation_of_nothing_can_still_be_divided_by() -> None:
    assert all(rule([], 8).denominator > 0 and rule([0], 8).denominator > 0 for rule in AGGREGATIONS.values())


def test_a_ratio_beyond_all_measure_gives_no_nan() -> None:
    for advantage in (1.0, -1.0):
        for name in get_args(LossName):
            loss, gradient, _ = computed(single(500.0, advantage, behaviour=-500.0), LossConfig(name), 1.0)
            assert math.isfinite(loss)
            assert gradient.isfinite().all()


@pytest.mark.parametrize("field", ["current", "proximal", "behaviour", "advantages", "weights"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_under_the_mask_that_is_not_finite_is_refused(field: str, value: float) -> None:
    spoiled = torch.tensor([value, -1.0], dtype=torch.float64)
    good = torch.tensor([-1.0, -1.0], dtype=torch.float64)
    tensors = dict.fromkeys(("current", "proximal", "behaviour", "advantages", "weights"), good) | {field: spoiled}
    tokens = LossTokens(**tensors, mask=torch.tensor([True, True]))
    for name in get_args(LossName):
        with pytest.raises(LossError, match="not finite"):
            LOSSES[name](tokens, LossConfig(name), 1.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "ppo"}, "'reinforce', 'clipped' or 'decoupled'"),
        ({"aggregation": "mean"}, "'token_mean', 'sequence_mean' or 'constant'"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"clip_low": math.nan}, "clip_low"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        replace(LossConfig(), **settings)  # type: ignore[arg-type]


def test_every_name_of_a_configuration_is_a_loss_or_an_aggregation() -> None:
    names = {field.name: get_args(get_type_hints(LossConfig)[field.name]) for field in fields(LossConfig)}
    assert names["loss"] == tuple(LOSSES)
    assert names["aggregation"] == tuple(AGGREGATIONS)


def test_tensors_that_do_not_fit_are_refused() -> None:
    good = random_tokens(1)
    with pytest.raises(LossError, match=r"proximal has shape \(3,\)"):
        replace(good, proximal=good.proximal[:3])
    with pytest.raises(LossError, match="bool"):
        replace(good, mask=good.mask.double())
    with pytest.raises(LossError, match="float32"):
        replace(good, behaviour=good.behaviour.bfloat16())
    with pytest.raises(LossError, match="detach"):
        replace(good, proximal=good.current)
    with pytest.raises(LossError, match="flat"):
        replace(good, current=good.current.detach().reshape(2, 12))
    for denominator in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(LossError, match="denominator"):
            computed(good, LossConfig(), denominator)
    with pytest.raises(LossError, match="at least one"):
        combined([])


def test_nothing_to_learn_from_is_a_loss_of_zero() -> None:
    drawn = random_tokens(3)
    loss, gradient, statistics = computed(replace(drawn, mask=torch.zeros_like(drawn.mask)), LossConfig(), 4.0)
    assert loss == 0
    assert not gradient.any()
    assert statistics.tokens == 0
    assert computed(part(drawn, 0, 0), LossConfig(), 4.0)[0] == 0


def test_the_alarm_sounds_above_the_bound_only() -> None:
    assert gap_alarm(GAP_TARGET) is None
    assert gap_alarm(GAP_ALARM) is None
    message = gap_alarm(1.4)
    assert message is not None
    assert "1.400 nats" in message
    assert gap_alarm(math.nan) is not None
