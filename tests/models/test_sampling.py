"""Sampling from many adapters at once: what each row would say alone, with the log-probabilities it really had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import random_adapter
from multilora_cases import DEVICES, random_tokens, with_adapters

from fedmoe.models.base import LoadedBase
from fedmoe.models.final_logits import UnsupportedModelError
from fedmoe.models.multilora import MultiLora
from fedmoe.models.packed import enable_checkpointing
from fedmoe.models.policy_logprobs import Continuation, plan_micro_batches, token_logprobs
from fedmoe.models.sampling import SampleResult, SampleSpec, SamplingLimits, sample

Pair = tuple[LoadedBase, MultiLora]
NAMES = ("a", "b", None, "c")
LARGE = SamplingLimits(rows=1000)


@pytest.fixture(scope="module")
def pair() -> Pair:
    return with_adapters()


def mixed(rows: int = 16, seed: int = 0) -> list[SampleSpec]:
    """All adapters in no order; prompts of several lengths, some shared; all temperatures and lengths."""
    rng = np.random.default_rng(seed)
    prompts = [random_tokens(rng, length) for length in (12, 3, 1, 25, 7)]
    prompts.append(prompts[0][:6])
    return [
        SampleSpec(NAMES[row % 4], prompts[row % 6], 1 + row % 9, (1.0, 0.6, 0.0, 1.7)[row // 2 % 4], 100 + row)
        for row in range(rows)
    ]


def drawn(
    pair: Pair,
    wanted: Sequence[SampleSpec],
    stop: frozenset[int] = frozenset(),
    limits: SamplingLimits = LARGE,
) -> list[SampleResult]:
    return sample(pair[0].model, pair[1], wanted, stop, limits)


def fresh_logprobs(pair: Pair, wanted: SampleSpec, tokens: tuple[int, ...]) -> np.ndarray:
    base, multi = pair
    one = [Continuation(wanted.adapter, wanted.prompt, tokens)]
    (batch,) = plan_micro_batches(one, 4096)
    with torch.no_grad(), multi.rows(batch.adapters):
        scored = token_logprobs(base.model, multi, batch, one, wanted.temperature or 1.0)
    return np.asarray(scored.logprobs.cpu().numpy(), np.float32)


def assert_same(found: Sequence[SampleResult], expected: Sequence[SampleResult], atol: float = 1e-4) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=atol, rtol=0)
        assert one.stopped == other.stopped


@pytest.mark.parametrize("device", DEVICES)
def test_the_logprobs_are_those_of_a_fresh_forward_pass(device: str) -> None:
    pair, wanted = with_adapters(device), mixed(24)
    for one, found in zip(wanted, drawn(pair, wanted), strict=True):
        assert found.logprobs.dtype == np.float32
        assert len(found.tokens) == one.max_new_tokens
        assert not found.stopped
        np.testing.assert_allclose(found.logprobs, fresh_logprobs(pair, one, found.tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_logprobs_are_near_those_of_a_fresh_forward_pass(device: str) -> None:
    # Trainer and sampler round differently; the loss's own alarm is at 0.2 nats a token.
    pair, wanted = with_adapters(device, "bf16"), mixed(24)
    gaps = [
        np.abs(found.logprobs - fresh_logprobs(pair, one, found.tokens))
        for one, found in zip(wanted, drawn(pair, wanted), strict=True)
    ]
    assert np.concatenate(gaps).mean() < 0.05


@pytest.mark.parametrize("device", DEVICES)
def test_a_seed_gives_its_tokens_whatever_the_neighbours(device: str) -> None:
    pair, wanted = with_adapters(device), mixed()
    expected = drawn(pair, wanted)
    assert_same(drawn(pair, wanted[::-1])[::-1], expected)
    assert_same([drawn(pair, [one])[0] for one in wanted], expected)
    others = [replace(one, seed=one.seed + 1000, max_new_tokens=7) for one in mixed(seed=1)]
    assert_same(drawn(pair, [*others, *wanted])[len(others) :], expected)
    assert [one.tokens for one in drawn(pair, [replace(one, seed=7) for one in wanted])] != [
        one.tokens for one in expected
    ]


@pytest.mark.parametrize(
    "limits",
    [
        SamplingLimits(rows=1),
        SamplingLimits(rows=3),
        SamplingLimits(prompt_tokens=1),
        SamplingLimits(prompt_tokens=40),
    ],
)
def test_the_limits_do_not_change_the_tokens(pair: Pair, limits: SamplingLimits) -> None:
    assert_same(drawn(pair, mixed(), limits=limits), drawn(pair, mixed()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("adapter", NAMES)
def test_temperature_zero_is_the_greedy_generation_of_transformers(adapter: str | None, device: str) -> None:
    base, multi = with_adapters(device)
    prompt = tuple(range(70, 80))
    wanted = [SampleSpec(adapter, prompt, 8, 0.0, 1), *mixed(8)]
    ids = torch.tensor([prompt], device=device)
    with multi.rows([adapter]):
        theirs = base.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, eos_token_id=None
        )
    mine = drawn((base, multi), wanted)[0]
    assert mine.tokens == tuple(theirs[0, len(prompt) :].tolist())
    np.testing.assert_allclose(mine.logprobs, fresh_logprobs((base, multi), wanted[0], mine.tokens), atol=1e-4)


def test_a_stop_token_ends_its_row_and_only_its_row(pair: Pair) -> None:
    wanted = [replace(one, max_new_tokens=9) for one in mixed()]
    free = drawn(pair, wanted)
    stop = frozenset({free[0].tokens[2], free[5].tokens[0], free[7].tokens[-1]})
    stopped = drawn(pair, wanted, stop)
    for one, whole in zip(stopped, free, strict=True):
        ends = [place for place, token in enumerate(whole.tokens) if token in stop]
        length = ends[0] + 1 if ends else len(whole.tokens)
        assert one.tokens == whole.tokens[:length]
        assert one.stopped == bool(ends)
        np.testing.assert_allclose(one.logprobs, whole.logprobs[:length], atol=1e-4)
    assert {one.stopped for one in stopped} == {True, False}


def test_rows_of_different_lengths_end_each_at_its_own(pair: Pair) -> None:
    wanted = [replace(mixed()[1], max_new_tokens=length) for length in (5, 1, 9, 2)]
    found = drawn(pair, wanted)
    assert [len(one.tokens) for one in found] == [5, 1, 9, 2]
    longest = found[2].tokens
    assert all(one.tokens == longest[: len(one.tokens)] for one in found)


def test_draws_follow_the_distribution(pair: Pair) -> None:
    for adapter, temperature in (("a", 1.0), (None, 0.5)):
        prompt, count = (65, 66, 67), 4000
        found = drawn(pair, [SampleSpec(adapter, prompt, 1, temperature, seed) for seed in range(count)])
        vocabulary = pair[0].model.config.vocab_size
        with torch.no_grad(), pair[1].rows([adapter]):
            logits = pair[0].model(torch.tensor([prompt]), use_cache=False).logits[0, -1]
        expected = torch.softmax(logits / temperature, dim=-1).double().numpy()
        assert expected.sum() == pytest.approx(1, abs=1e-4)
        counts = np.bincount([one.tokens[0] for one in found], minlength=vocabulary)
        common = expected * count >= 5
        observed = np.append(counts[common], counts[~common].sum())
        hoped = np.append(expected[common], expected[~common].sum()) * count
        assert common.sum() > 10
        # Pearson's statistic has mean k and variance 2k; the seeds are fixed, so this passes always or never.
        statistic, freedom = float(((observed - hoped) ** 2 / hoped).sum()), len(hoped) - 1
        assert statistic < freedom + 3 * np.sqrt(2 * freedom)


def test_later_draws_of_a_row_are_independent_of_its_first(pair: Pair) -> None:
    wanted = [SampleSpec("b", (65,), 2, 1.0, seed) for seed in range(300)]
    found = drawn(pair, wanted)
    again = drawn(pair, [replace(one, prompt=(65, 90)) for one in wanted])
    assert len({one.tokens for one in found}) > 250
    assert np.mean([one.tokens == other.tokens for one, other in zip(found, again, strict=True)]) < 0.1


def test_a_draw_of_almost_one_never_takes_an_impossible_token(monkeypatch: pytest.MonkeyPatch, pair: Pair) -> None:
    class Almost:
        def random(self, size: int) -> np.ndarray:
            return np.full(size, 1 - 1e-12)  # 1 in float32

    monkeypatch.setattr(np.random, "default_rng", lambda seed: Almost())
    cold = [SampleSpec(name, (65, 66), 3, 0.01, 0) for name in NAMES]
    for one in drawn(pair, cold):
        assert (one.logprobs > -25).all()


def test_no_wish_gives_nothing(pair: Pair) -> None:
    assert drawn(pair, []) == []


def test_sampling_leaves_no_trace_in_the_model(pair: Pair) -> None:
    base, multi = pair
    ids = torch.tensor([[65, 66, 67]])
    with torch.no_grad():
        before = base.model(ids).logits
        drawn(pair, mixed())
        torch.testing.assert_close(base.model(ids).logits, before, atol=0, rtol=0)
    assert all(multi.slot(name).parameter.grad is None for name in multi.names)


@pytest.mark.parametrize(
    "wrong", [{"prompt": ()}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}]
)
def test_a_wish_that_cannot_be_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="got"):
        replace(mixed()[0], **wrong)  # type: ignore[arg-type]


def test_a_model_whose_numbers_overflow_is_an_error_that_names_the_adapter() -> None:
    base, multi = with_adapters()
    multi.add("wild", random_adapter(multi.layout(2), 9, 1e20, 1.0))
    with pytest.raises(FloatingPointError, match="wild"):
        drawn((base, multi), [SampleSpec("wild", (65, 66), 3, 1.0, 0), SampleSpec("a", (65,), 3, 1.0, 0)])


def test_a_model_in_checkpointing_training_is_refused() -> None:
    base, multi = with_adapters()
    enable_checkpointing(base.model)
    assert drawn((base, multi), mixed(2))
    base.model.train()
    with pytest.raises(UnsupportedModelError, match="cache"):
        drawn((base, multi), mixed(2))
