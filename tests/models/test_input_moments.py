"""Input moments: those of a plain loop over samples, whatever the batches, and a model that is left as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedmoe.datasets.tokens.packing import Block, collate, pack
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample
from fedmoe.lora.moments import InputMoments, merge_moments, omega
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.input_moments import MomentsCollector
from fedmoe.models.lora_layers import TargetError, attach

Q0 = "model.layers.0.self_attn.q_proj"
DOWN1 = "model.layers.1.mlp.down_proj"
TARGETS = ("q_proj", "down_proj")


@pytest.fixture
def base() -> LoadedBase:
    return load_base("tiny", "cpu", "fp32")


def samples(seed: int = 0) -> list[TokenizedSample]:
    draws = np.random.default_rng(seed)
    ids = [draws.integers(0, 256, length).astype(np.int64) for length in (7, 12, 3, 20, 9, 15)]
    return [TokenizedSample(row, row) for row in ids]


def blocks(seed: int = 0) -> list[Block]:
    return pack(samples(seed), 32, 0)


def gathered(base: LoadedBase, batches: list[list[Block]], sketch_size: int = 8, seed: int = 3) -> InputMoments:
    with MomentsCollector(base, TARGETS, sketch_size, seed) as collector:
        for batch in batches:
            collector.add(collate(batch))
    return collector.moments()


def grams(base: LoadedBase, name: str) -> NDArray[np.float64]:
    """The weighted mean of x x' over all tokens of `samples`, each sample run alone: no packing, no padding."""
    inputs: list[torch.Tensor] = []
    gradients: list[torch.Tensor] = []

    def hear(_: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        inputs.append(given[0][0].detach())
        output.register_hook(lambda gradient: gradients.append(gradient[0]))

    hook = base.model.get_submodule(name).register_forward_hook(hear)
    for sample in samples():
        ids = torch.from_numpy(sample.input_ids)[None]
        embedded = base.model.get_input_embeddings()(ids).requires_grad_()
        (base.model(inputs_embeds=embedded, labels=ids).loss * (ids.shape[1] - 1)).backward()
    hook.remove()
    x, g = (torch.cat(parts).numpy().astype(np.float64) for parts in (inputs, gradients))
    weights = np.square(g).sum(axis=1)
    return np.asarray((x.T * weights) @ x / len(x), np.float64)


@pytest.mark.parametrize("name", [Q0, DOWN1])
def test_moments_are_those_of_every_sample_run_alone(base: LoadedBase, name: str) -> None:
    moments = gathered(base, [[block] for block in blocks()])
    expected = grams(base, name)
    assert moments.tokens == sum(len(sample.input_ids) for sample in samples())
    found, size = moments.modules[name], float(np.abs(expected).max())
    np.testing.assert_allclose(found.diagonal, np.diag(expected), rtol=1e-4, atol=1e-5 * size)
    sketch = expected @ omega(3, name, len(expected), 8).astype(np.float64)
    np.testing.assert_allclose(found.sketch, sketch, rtol=1e-4, atol=1e-4 * size)


def test_layers_with_one_input_share_its_weight_and_their_sketches_add_up(base: LoadedBase) -> None:
    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
    with MomentsCollector(base, ("q_proj", "k_proj", "v_proj", "o_proj"), 8) as collector:
        collector.add(collate(blocks()))
    moments = collector.moments()
    assert set(moments.group_of[names[0]]) == set(names)
    own = np.sum([np.diag(grams(base, name)) for name in names], axis=0)
    np.testing.assert_allclose(moments.modules[names[0]].diagonal, own, rtol=1e-3, atol=1e-5 * float(own.max()))


def test_a_sketch_as_wide_as_the_module_is_the_whole_matrix(base: LoadedBase) -> None:
    moments = gathered(base, [blocks()], sketch_size=64)
    expected = grams(base, Q0)
    np.testing.assert_allclose(moments.modules[Q0].sketch, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))
    wide = gathered(base, [blocks()], sketch_size=1000)
    np.testing.assert_array_equal(wide.modules[Q0].sketch, moments.modules[Q0].sketch)
    assert wide.modules[DOWN1].sketch.shape == (128, 128)


def same(left: InputMoments, right: InputMoments) -> None:
    assert (left.tokens, left.seed, left.modules.keys()) == (right.tokens, right.seed, right.modules.keys())
    for name, module in left.modules.items():
        other = right.modules[name]
        size = float(np.abs(other.sketch).max())
        np.testing.assert_allclose(module.diagonal, other.diagonal, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(module.sketch, other.sketch, rtol=1e-3, atol=1e-5 * size)


def test_how_blocks_are_put_into_batches_does_not_matter(base: LoadedBase) -> None:
    one_by_one = gathered(base, [[block] for block in blocks()])
    same(gathered(base, [blocks()]), one_by_one)
    same(gathered(base, [blocks()[::-1]]), one_by_one)


def test_moments_of_parts_merge_to_those_of_the_whole(base: LoadedBase) -> None:
    parts = [gathered(base, [[block]]) for block in blocks()]
    same(merge_moments(parts), gathered(base, [blocks()]))


def test_padding_counts_for_nothing(base: LoadedBase) -> None:
    short, long = (pack(samples(), length, 0) for length in (32, 64))
    same(gathered(base, [[block] for block in long]), gathered(base, [[block] for block in short]))


def test_a_bf16_base_is_summed_in_float32() -> None:
    low = gathered(load_base("tiny", "cpu", "bf16"), [blocks()])
    full = gathered(load_base("tiny", "cpu", "fp32"), [blocks()])
    for name, module in full.modules.items():
        np.testing.assert_allclose(low.modules[name].diagonal, module.diagonal, rtol=0.2, atol=0.05)


@pytest.mark.gpu
def test_moments_on_a_gpu_are_those_of_the_processor(base: LoadedBase) -> None:
    same(gathered(load_base("tiny", "cuda", "fp32"), [blocks()]), gathered(base, [blocks()]))


def hooks(base: LoadedBase) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in base.model.modules())


def test_no_hook_is_left_even_after_an_error(base: LoadedBase) -> None:
    with MomentsCollector(base, TARGETS) as collector:
        assert hooks(base) == 5  # two layers of each of two targets, and the embeddings
        collector.add(collate(blocks()))
    assert hooks(base) == 0
    with pytest.raises(KeyError), MomentsCollector(base, TARGETS):
        raise KeyError
    assert hooks(base) == 0


def test_the_model_computes_as_before(base: LoadedBase) -> None:
    before = base.model(torch.tensor([[1, 2, 3]])).logits
    gathered(base, [blocks()])
    torch.testing.assert_close(base.model(torch.tensor([[1, 2, 3]])).logits, before, rtol=0, atol=0)


def test_tokens_without_a_mask_are_refused(base: LoadedBase) -> None:
    with (
        pytest.raises(RuntimeError, match="without 'add'"),
        MomentsCollector(base, TARGETS),
    ):
        base.model(torch.tensor([[1, 2, 3]]))


def test_a_collector_is_used_in_its_context(base: LoadedBase) -> None:
    collector = MomentsCollector(base, TARGETS)
    with pytest.raises(RuntimeError, match="inside its context"):
        collector.add(collate(blocks()))
    with pytest.raises(ValueError, match="no labelled token was added"):
        collector.moments()


def test_only_a_bare_base_and_its_inner_layers_are_measured(base: LoadedBase) -> None:
    with pytest.raises(TargetError, match="output head"):
        MomentsCollector(base, ("q_proj", "lm_head"))
    with pytest.raises(TargetError, match="no linear layer"):
        MomentsCollector(base, "nothing")
    with pytest.raises(ValueError, match="at least 1, got 0"):
        MomentsCollector(base, TARGETS, sketch_size=0)
    attach(base.model, "q_proj", 2, 4.0)
    with pytest.raises(TargetError, match="carries an adapter"):
        MomentsCollector(base, TARGETS)
