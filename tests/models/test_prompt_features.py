"""Prompt features: what they are, that a batch changes nothing, and that the model is left as it was."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.prompt_features import features_width, prefix_features, prompt_features, routing_depths

LENGTHS = (5, 1, 64, 2, 17, 40)


def prompts(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[list[int]]:
    draws = np.random.default_rng(seed)
    return [draws.integers(0, 256, length).tolist() for length in lengths]


def states(base: LoadedBase, ids: list[int], depths: Sequence[int]) -> torch.Tensor:
    """Hidden states of one prompt after so many layers, every position scaled to mean square 1."""
    heard: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda *of: heard.append(of[2])) for layer in base.model.base_model.layers]
    with torch.no_grad():
        base.model.base_model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    raw = [heard[depth - 1][0] for depth in depths]
    return torch.cat([state / state.square().mean(dim=-1, keepdim=True).sqrt() for state in raw], dim=-1)


@pytest.mark.parametrize("depths", [(1,), (2,), (1, 2)])
def test_features_are_the_mean_states_without_the_first_position(base: LoadedBase, depths: tuple[int, ...]) -> None:
    found = prompt_features(base, prompts(), depths)
    assert found.dtype == np.float32
    for row, ids in zip(found, prompts(), strict=True):
        expected = states(base, ids, depths)
        expected = expected[1:].mean(dim=0) if len(ids) > 1 else expected[0]
        np.testing.assert_allclose(row, expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layers", "depths"), [(2, (1,)), (8, (1, 2)), (12, (1, 2, 3)), (24, (2, 3, 5, 6)), (30, (2, 4, 6, 8))]
)
def test_prompts_are_looked_at_up_to_a_quarter_of_the_layers(layers: int, depths: tuple[int, ...]) -> None:
    base = load_base("tiny", "cpu", "fp32")
    base.model.base_model.layers = torch.nn.ModuleList([base.model.base_model.layers[0]] * layers)
    assert routing_depths(base) == depths
    assert features_width(base) == 64 * len(depths)


def test_a_quarter_of_the_layers_is_the_default(base: LoadedBase) -> None:
    np.testing.assert_array_equal(prompt_features(base, prompts()), prompt_features(base, prompts(), (1,)))


def test_features_do_not_depend_on_the_batch(base: LoadedBase) -> None:
    together = prompt_features(base, prompts(), (1, 2))
    alone = np.concatenate([prompt_features(base, [ids], (1, 2)) for ids in prompts()])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)
    turned = prompt_features(base, prompts()[::-1], (1, 2))[::-1]
    np.testing.assert_allclose(together, turned, rtol=0, atol=1e-5)


def test_many_prompts_are_cut_into_batches(base: LoadedBase) -> None:
    many = prompts([300] * 20 + [3] * 5)
    found = prompt_features(base, many)
    np.testing.assert_allclose(found[[0, 19, 24]], prompt_features(base, [many[0], many[19], many[24]]), atol=1e-5)


def test_beginnings_out_of_one_pass_are_the_features_of_the_beginnings(base: LoadedBase) -> None:
    wanted = [(2, 5), (), (64, 1, 9), (2,), (16,), (1, 40)]
    found = prefix_features(base, prompts(), wanted)
    cut = [ids[:length] for ids, lengths in zip(prompts(), wanted, strict=True) for length in lengths]
    np.testing.assert_allclose(found, prompt_features(base, cut), rtol=0, atol=1e-5)


def hooks(base: LoadedBase) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in base.model.modules())


def test_the_model_is_left_as_it_was(base: LoadedBase) -> None:
    body = base.model.base_model
    layers, logits, before = body.layers, base.model(torch.tensor([[1, 2, 3]])).logits, hooks(base)
    prompt_features(base, prompts(), (1, 2))
    assert body.layers is layers
    assert len(layers) == 2
    assert hooks(base) == before
    torch.testing.assert_close(base.model(torch.tensor([[1, 2, 3]])).logits, logits, rtol=0, atol=0)


def test_a_bf16_base_gives_float32_features() -> None:
    found = prompt_features(load_base("tiny", "cpu", "bf16"), prompts())
    assert found.dtype == np.float32
    assert np.isfinite(found).all()


@pytest.mark.gpu
def test_features_on_a_gpu_are_those_of_the_processor(base: LoadedBase) -> None:
    found = prompt_features(load_base("tiny", "cuda", "fp32"), prompts())
    np.testing.assert_allclose(found, prompt_features(base, prompts()), rtol=1e-3, atol=1e-3)


def test_no_prompt_gives_no_row(base: LoadedBase) -> None:
    assert prompt_features(base, []).shape == (0, 64)


def test_what_has_no_features_is_refused(base: LoadedBase) -> None:
    with pytest.raises(ValueError, match="prompt 1 has 0 tokens"):
        prompt_features(base, [[1], []])
    with pytest.raises(ValueError, match=r"prompt 0 has 3 tokens; lengths must be 1 to that, got \[4\]"):
        prefix_features(base, [[1, 2, 3]], [(4,)])
    with pytest.raises(ValueError, match="1 prompts need as many lists of lengths, got 2"):
        prefix_features(base, [[1, 2, 3]], [(1,), (2,)])
    for depths in ((0,), (1, 3), (-1,), ()):
        with pytest.raises(ValueError, match="depths must be 1 to 2"):
            prompt_features(base, prompts(), depths)
