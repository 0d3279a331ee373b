"""Log-probabilities without keeping logits equal those by way of all logits; unsupported models are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from multilora_cases import DEVICES
from torch import nn
from transformers import PreTrainedModel

import fedmoe.models.final_logits as final_logits
from fedmoe.models.final_logits import UnsupportedModelError, check_causal_model, logits_of, selected_logprobs
from fedmoe.models.tiny import tiny_model

PLACES = np.array([0, 0, 0, 1, 3, 4, 5, 5, 6])
TARGETS = np.array([7, 9, 7, 258, 0, 31, 100, 101, 5])


def hidden_states(device: str = "cpu") -> torch.Tensor:
    return torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).to(device)


def by_all_logits(
    model: PreTrainedModel, hidden: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = torch.log_softmax(logits_of(model, hidden) / temperature, dim=-1)
    entropies = -(logprobs.exp() * logprobs).sum(dim=-1)
    return logprobs[PLACES, TARGETS], entropies[PLACES]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at_once", [259 * 1, 259 * 3, 1 << 24])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_by_way_of_all_logits(
    monkeypatch: pytest.MonkeyPatch, at_once: int, temperature: float, device: str
) -> None:
    monkeypatch.setattr(final_logits, "_LOGITS_AT_ONCE", at_once)
    model, hidden = tiny_model().requires_grad_(False).to(device), hidden_states(device).requires_grad_()
    logprobs, entropies = selected_logprobs(model, hidden, PLACES, TARGETS, temperature)
    expected, expected_entropies = by_all_logits(model, hidden, temperature)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, atol=1e-5, rtol=1e-5)
    assert not entropies.requires_grad
    weights = torch.linspace(-2, 1, len(PLACES), device=device)
    mine, theirs = (torch.autograd.grad((weights * one).sum(), hidden)[0] for one in (logprobs, expected))
    assert theirs.abs().max() > 0.1
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert not mine[2].any()


def test_a_head_with_a_bias_counts_its_bias() -> None:
    model, hidden = tiny_model().requires_grad_(False), hidden_states().requires_grad_()
    model.set_output_embeddings(nn.Linear(64, 259).requires_grad_(False))
    expected = by_all_logits(model, hidden, 1.0)[0]
    logprobs = selected_logprobs(model, hidden, PLACES, TARGETS)[0]
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    mine, theirs = (torch.autograd.grad(one.sum(), hidden)[0] for one in (logprobs, expected))
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_logits_far_apart_do_not_overflow() -> None:
    model, hidden = tiny_model().requires_grad_(False), (hidden_states() * 1e4).requires_grad_()
    logprobs, entropies = selected_logprobs(model, hidden, PLACES, TARGETS)
    expected, expected_entropies = by_all_logits(model, hidden, 1.0)
    torch.testing.assert_close(logprobs, expected, atol=1e-2, rtol=1e-5)
    torch.testing.assert_close(entropies, expected_entropies, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(torch.autograd.grad(logprobs.sum(), hidden)[0]).all()


def test_half_precision_gradients_are_in_the_models_dtype_and_near() -> None:
    model, exact = tiny_model().bfloat16().requires_grad_(False), tiny_model().requires_grad_(False)
    hidden = hidden_states().bfloat16().requires_grad_()
    fine = hidden.detach().float().requires_grad_()
    logprobs, expected = selected_logprobs(model, hidden, PLACES, TARGETS)[0], by_all_logits(exact, fine, 1.0)[0]
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected, atol=0.1, rtol=0)
    mine, theirs = torch.autograd.grad(logprobs.sum(), hidden)[0], torch.autograd.grad(expected.sum(), fine)[0]
    assert mine.dtype == torch.bfloat16
    assert (mine.float() - theirs).abs().max() <= 0.03 * theirs.abs().max()


def test_the_tiny_model_is_supported() -> None:
    check_causal_model(tiny_model())


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "logit_scale", "logits_scaling"])
def test_a_model_that_changes_its_logits_is_refused(setting: str) -> None:
    model = tiny_model()
    setattr(model.config, setting, 1.0)
    check_causal_model(model)
    setattr(model.config, setting, 30.0)
    with pytest.raises(UnsupportedModelError, match=setting):
        check_causal_model(model)


def test_other_attention_and_other_heads_are_refused() -> None:
    model = tiny_model()
    model.set_output_embeddings(nn.Sequential(nn.Linear(64, 259)))
    with pytest.raises(UnsupportedModelError, match="head"):
        check_causal_model(model)
    model = tiny_model()
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="'eager'"):
        check_causal_model(model)


def test_sliding_windows_are_refused() -> None:
    model = tiny_model()
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(UnsupportedModelError, match="sliding_attention"):
        check_causal_model(model)
