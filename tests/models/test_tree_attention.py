"""The attention that bfloat16 training on CPUs uses is that of PyTorch, and only there it is used."""

from __future__ import annotations

import pytest
import torch
from multilora_cases import random_ids
from torch.nn import functional

import fedmoe.models.tree_attention as tree_attention_module
from fedmoe.models.final_logits import check_causal_model
from fedmoe.models.prefix_tree import batch_forests, grow_forests
from fedmoe.models.tiny import tiny_model
from fedmoe.models.tree_attention import tree_attention, use_tree_attention

SEQUENCES = [(1, 2, 3, 4), (1, 2, 5), (1, 9, 9, 9, 9), (7,), (7, 8, 8)]
Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tree_mask() -> torch.Tensor:
    return batch_forests(grow_forests(SEQUENCES, 8), torch.device("cpu"))[2]


def parts(mask: torch.Tensor, heads: int, key_heads: int, dtype: torch.dtype) -> Three:
    generator = torch.Generator().manual_seed(0)
    rows, size = mask.shape[0], mask.shape[-1]

    def part(count: int) -> torch.Tensor:
        # As a model makes them: heads inside positions, so nothing here is contiguous.
        made = torch.randn(rows, size, count, 16, generator=generator, dtype=dtype)
        return made.transpose(1, 2).requires_grad_()

    return part(heads), part(key_heads), part(key_heads)


def fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    found: torch.Tensor = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return found


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
def test_values_and_gradients_are_pytorchs(heads: int, key_heads: int) -> None:
    mask = tree_mask()
    tensors = parts(mask, heads, key_heads, torch.float64)
    mine, theirs = tree_attention(*tensors, mask, 0.3), fused(*tensors, mask, 0.3)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    given = torch.randn(mine.transpose(1, 2).shape, dtype=torch.float64).transpose(1, 2)
    for one, other in zip(*(torch.autograd.grad(out, tensors, given) for out in (mine, theirs)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_bfloat16_is_as_near_to_the_truth_as_pytorchs() -> None:
    mask = tree_mask()
    tensors = parts(mask, 6, 2, torch.bfloat16)
    query, key, value = (one.detach().double().requires_grad_() for one in tensors)
    exact = (query, key, value)
    truth = fused(*exact, mask, 0.25)
    expected = torch.autograd.grad(truth.sum(), exact)
    for attend in (tree_attention, fused):
        found = attend(*tensors, mask, 0.25)
        assert (found - truth).abs().max() < 0.03
        for one, other in zip(torch.autograd.grad(found.float().sum(), tensors), expected, strict=True):
            assert (one - other).abs().max() < 0.06


def test_a_model_trains_with_it_and_samples_without(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Size] = []

    def watched(query: torch.Tensor, *others: object) -> torch.Tensor:
        calls.append(query.shape)
        return tree_attention(query, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(tree_attention_module, "tree_attention", watched)
    plain, model = (tiny_model().requires_grad_(False).eval() for _ in range(2))
    use_tree_attention(model)
    check_causal_model(model)
    ids, positions, mask = batch_forests(grow_forests(SEQUENCES, 8), torch.device("cpu"))
    gradients = []
    for each in (plain, model):
        embedded = each.get_input_embeddings()(ids).requires_grad_()
        each(
            inputs_embeds=embedded, position_ids=positions, attention_mask=mask, use_cache=False
        ).logits.sum().backward()
        gradients.append(embedded.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)
    assert len(calls) == model.config.num_hidden_layers
    with torch.no_grad():
        found, expected = (
            each.generate(random_ids(2, 5), attention_mask=torch.ones(2, 5).long(), do_sample=False, max_new_tokens=3)
            for each in (model, plain)
        )
    assert found.tolist() == expected.tolist()
    assert len(calls) == model.config.num_hidden_layers
