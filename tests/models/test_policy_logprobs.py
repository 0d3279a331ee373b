"""Log-probabilities under many policies at once equal those of each sequence in a plain forward pass of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multilora_cases import DEVICES, random_tokens, with_adapters

from fedmoe.models.base import LoadedBase
from fedmoe.models.multilora import MultiLora
from fedmoe.models.policy_logprobs import Continuation, MicroBatch, TokenLogprobs, plan_micro_batches, token_logprobs

Pair = tuple[LoadedBase, MultiLora]
Found = list[tuple[torch.Tensor, torch.Tensor]]


def mixed(seed: int = 0) -> list[Continuation]:
    """Three policies and the base in no order, prompts shared and not, lengths 1 to 7, one pair of equals."""
    rng = np.random.default_rng(seed)
    prompts = [random_tokens(rng, length) for length in (9, 4, 1)]
    names = ["b", "a", None, "c"]
    made = [
        Continuation(names[index % 4], prompts[index % 3], random_tokens(rng, 1 + index % 7)) for index in range(20)
    ]
    return [*made, made[3], Continuation("a", prompts[0] + made[1].tokens, (1, 2, 3))]


def one_by_one(pair: Pair, continuations: Sequence[Continuation], temperature: float = 1.0) -> Found:
    """Log-probabilities and entropies of every continuation's tokens."""
    base, multi = pair
    found = []
    for one in continuations:
        ids = torch.tensor([one.prompt + one.tokens], device=multi.device)
        with multi.rows([one.adapter]):
            logits = base.model(ids, use_cache=False).logits[0, len(one.prompt) - 1 : -1].float()
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        entropies = torch.distributions.Categorical(logits=logprobs.detach()).entropy()
        found.append((logprobs.gather(1, ids[0, len(one.prompt) :, None])[:, 0], entropies))
    return found


def together(
    pair: Pair, continuations: Sequence[Continuation], temperature: float = 1.0, max_tokens: int = 4096, row: int = 512
) -> Found:
    base, multi = pair
    parts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for batch in plan_micro_batches(continuations, max_tokens, row):
        with multi.rows(batch.adapters):
            scored = token_logprobs(base.model, multi, batch, continuations, temperature)
        for member, part in taken_apart(scored, batch).items():
            assert member not in parts
            parts[member] = part
    return [parts[index] for index in range(len(continuations))]


def taken_apart(scored: TokenLogprobs, batch: MicroBatch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    owners, order = scored.owners.tolist(), list(dict.fromkeys(scored.owners.tolist()))
    assert owners == sorted(owners, key=order.index), "the tokens of a continuation are not neighbours"
    assert order == batch.members()
    mine = {member: scored.owners == member for member in order}
    return {member: (scored.logprobs[mine[member]], scored.entropies[mine[member]]) for member in order}


def gradients(pair: Pair, found: Found, weights: Sequence[float]) -> dict[str, torch.Tensor]:
    multi = pair[1]
    torch.stack(
        [(logprobs * weight).sum() for (logprobs, _), weight in zip(found, weights, strict=True)]
    ).sum().backward()
    taken = {}
    for name in multi.names:
        gradient = multi.slot(name).parameter.grad
        assert gradient is not None
        taken[name], multi.slot(name).parameter.grad = gradient.clone(), None
    return taken


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropies_and_gradients_equal_those_of_each_sequence_alone(device: str, temperature: float) -> None:
    pair, continuations = with_adapters(device), mixed()
    mine, theirs = (each(pair, continuations, temperature) for each in (together, one_by_one))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one[1], other[1], atol=1e-5, rtol=1e-5)
        assert not one[1].requires_grad
    weights = np.random.default_rng(1).normal(size=len(continuations)).tolist()
    found, expected = (gradients(pair, each, weights) for each in (mine, theirs))
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize(("max_tokens", "row"), [(4096, 8), (64, 512), (30, 30), (1, 1)])
def test_the_size_of_a_micro_batch_does_not_matter(max_tokens: int, row: int) -> None:
    pair, continuations = with_adapters(), mixed()
    whole = together(pair, continuations)
    parts = together(pair, continuations, max_tokens=max_tokens, row=row)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-5)
    weights = np.random.default_rng(1).normal(size=len(continuations)).tolist()
    expected, found = (gradients(pair, each, weights) for each in (whole, parts))
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(found[name], gradient, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_bfloat16_stays_within_a_tenth_of_a_nat_on_average(device: str) -> None:
    continuations = mixed()
    rough, fine = (together(with_adapters(device, dtype), continuations) for dtype in ("bf16", "fp32"))
    gaps = torch.cat([(one[0] - other[0]).detach().abs() for one, other in zip(rough, fine, strict=True)])
    assert gaps.mean() < 0.1
    assert all(one[0].dtype == torch.float32 for one in rough)


def test_a_shared_prompt_is_computed_once_however_long() -> None:
    rng = np.random.default_rng(0)
    for length in (60, 700):
        prompt = random_tokens(rng, length)
        continuations = [Continuation("a", prompt, random_tokens(rng, 8)) for _ in range(8)]
        (batch,) = plan_micro_batches(continuations, 4096)
        assert len(batch.forests) * max(map(len, batch.forests)) == length + 8 * 7


def test_policies_with_the_same_prompt_do_not_share_it() -> None:
    continuations = [Continuation(name, (1, 2, 3), (4, 5)) for name in ("a", "b", "a", None)]
    (batch,) = plan_micro_batches(continuations, 4096)
    assert batch.adapters == ("a", "b", None)
    assert [len(forest) for forest in batch.forests] == [4, 4, 4]


TOKENS = st.lists(st.integers(0, 3), min_size=1, max_size=9).map(tuple)
CONTINUATIONS = st.lists(st.builds(Continuation, st.sampled_from(["a", "b", None]), TOKENS, TOKENS), max_size=15)


@settings(deadline=None)
@given(CONTINUATIONS, st.integers(1, 60), st.integers(1, 40))
def test_a_plan_holds_everything_once_within_its_budget(
    continuations: list[Continuation], max_tokens: int, max_row: int
) -> None:
    plan = plan_micro_batches(continuations, max_tokens, max_row)
    assert sorted(member for batch in plan for member in batch.members()) == list(range(len(continuations)))
    for batch in plan:
        assert len(batch.forests) * max(map(len, batch.forests)) <= max_tokens or len(batch.forests) == 1
        # Rows of one adapter are neighbours, each adapter in one stretch.
        changes = sum(one != other for one, other in zip(batch.adapters, batch.adapters[1:], strict=False))
        assert changes == len(set(batch.adapters)) - 1
        for adapter, forest in zip(batch.adapters, batch.forests, strict=True):
            for member, path in zip(forest.members, forest.paths, strict=True):
                one = continuations[member]
                assert one.adapter == adapter
                assert tuple(forest.tokens[path].tolist()) == one.prompt + one.tokens[:-1]


@pytest.mark.parametrize(("prompt", "tokens"), [((), (1,)), ((1,), ())])
def test_a_continuation_without_prompt_or_tokens_is_refused(prompt: tuple[int, ...], tokens: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        Continuation("a", prompt, tokens)
