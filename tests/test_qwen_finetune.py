import dataclasses
import os
import time

import numpy as np
import pytest
import torch
from safetensors.numpy import load, save

from fedmoe.datasets.tokens.packing import PADDING_SEGMENT, Batch, Block, collate, pack
from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample
from fedmoe.lora.adapter import Adapter
from fedmoe.models.base import load_base
from fedmoe.models.packed import attention_mask, count_targets, token_losses
from fedmoe.qwen_finetune import LoraConfig, NonFiniteError, QwenLoRAExpert, ScheduleEndedError, TrainingConfig

CPU = torch.device("cpu")
LORA = LoraConfig(r=4, lora_alpha=8)


def expert_with(lora: LoraConfig = LORA, dtype: str = "fp32", **training: float | str | bool) -> QwenLoRAExpert:
    expert = QwenLoRAExpert(load_base("tiny", "cpu", dtype), lora, TrainingConfig(**training))  # type: ignore[arg-type]
    size = expert.attached.layout.size
    expert.load_weights(np.random.default_rng(0).normal(0, 0.1, size).astype(np.float32))
    return expert


def samples(count: int, seed: int = 0, longest: int = 20) -> list[TokenizedSample]:
    random = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = random.integers(0, 256, random.integers(4, longest))
        labels = ids.copy()
        labels[: len(ids) // 3] = MASKED
        found.append(TokenizedSample(ids, labels))
    return found


def blocks(count: int, seed: int = 0) -> list[Block]:
    return pack(samples(4 * count, seed), 40, seed)[:count]


def test_a_packed_sample_has_the_logits_it_has_alone() -> None:
    expert = expert_with()
    three = samples(3)
    (block,) = pack(three, 64, 0)
    batch = collate([block])
    with torch.no_grad():
        packed = expert.base.model(
            input_ids=torch.from_numpy(batch.input_ids),
            attention_mask=attention_mask(torch.from_numpy(batch.segment_ids)),
            position_ids=torch.from_numpy(batch.position_ids),
        ).logits[0]
        for segment in range(3):
            inside = block.segment_ids == segment
            alone = expert.base.model(input_ids=torch.from_numpy(block.input_ids[inside])[None]).logits[0]
            torch.testing.assert_close(packed[torch.from_numpy(inside)], alone, atol=1e-5, rtol=1e-5)


def test_packed_samples_have_the_gradient_they_have_alone() -> None:
    expert = expert_with()
    three = samples(3)
    (block,) = pack(three, 64, 0)
    loss, _ = expert._gradient([collate([block])], 10)
    packed = expert.attached.grad.clone()
    alone = [collate(pack([sample], len(sample.input_ids), 0)) for sample in three]
    loss_alone, _ = expert._gradient(alone, 10)
    assert abs(loss - loss_alone) < 1e-5
    torch.testing.assert_close(expert.attached.grad, packed, atol=1e-6, rtol=1e-4)


def test_the_loss_is_that_of_transformers_for_one_whole_sample() -> None:
    expert = expert_with()
    ids = np.random.default_rng(0).integers(0, 256, 30)
    block = pack([TokenizedSample(ids, ids)], 30, 0)[0]
    inputs = torch.from_numpy(ids)[None]
    expected = expert.base.model(input_ids=inputs, labels=inputs).loss.item()
    assert expert.evaluate([block], 1).loss == pytest.approx(expected, abs=1e-5)


def test_loss_and_gradient_are_those_of_all_logits_of_padded_rows() -> None:
    expert = expert_with()
    two = pack(samples(2), 64, 0) + pack(samples(1, 1), 64, 0)
    assert all(block.segment_ids[-1] == PADDING_SEGMENT for block in two)
    batch = collate(two)
    loss, _ = expert._gradient([batch], count_targets(batch))
    mine = expert.attached.grad.clone()
    expert.attached.zero_grad()
    inputs, labels, positions, segments = map(
        torch.from_numpy, (batch.input_ids, batch.labels, batch.position_ids, batch.segment_ids)
    )
    logits = expert.base.model(input_ids=inputs, attention_mask=attention_mask(segments), position_ids=positions).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=MASKED)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(mine, expert.attached.grad, atol=1e-6, rtol=1e-4)


def test_the_first_token_of_a_sample_is_never_predicted_by_the_one_before() -> None:
    ids = np.arange(12)
    block = Block(ids, ids, np.tile(np.arange(6), 2), np.repeat([0, 1], 6))
    batch = collate([block])
    assert count_targets(batch) == 10
    losses, _ = token_losses(expert_with().base.model, batch, CPU)
    assert losses.shape == (10,)


def test_accumulated_micro_batches_equal_the_whole_batch() -> None:
    four = blocks(4)
    # Different numbers of labelled tokens: the mean of the means would be another number.
    counts = {count_targets(collate([block])) for block in four}
    assert len(counts) > 1
    whole, parts = expert_with(), expert_with()
    for _ in range(3):
        one = whole.train_step([collate(four)])
        other = parts.train_step([collate(four[:1]), collate(four[1:])])
        assert one.tokens == other.tokens
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
    np.testing.assert_allclose(whole.weights(), parts.weights(), atol=1e-5)


def test_a_micro_batch_without_labels_changes_nothing() -> None:
    two = blocks(2)
    empty = dataclasses.replace(two[1], labels=np.full_like(two[1].labels, MASKED))
    first, second = expert_with(), expert_with()
    a, b = first.train_step([collate(two[:1])]), second.train_step([collate(two[:1]), collate([empty])])
    assert (a.loss, a.tokens, a.grad_norm) == (b.loss, b.tokens, b.grad_norm)
    with pytest.raises(ValueError, match="no token of this step is labelled"):
        first.train_step([collate([empty])])


@pytest.mark.parametrize(("dtype", "checkpointing"), [("fp32", False), ("bf16", False), ("fp32", True)])
def test_the_loss_falls(dtype: str, checkpointing: bool) -> None:
    expert = expert_with(dtype=dtype, gradient_checkpointing=checkpointing, warmup_steps=2, learning_rate=5e-3)
    batch = collate(blocks(2))
    losses = [expert.train_step([batch]).loss for _ in range(15)]
    assert losses[-1] < losses[0] - 0.5
    assert expert.step == 15


def test_a_step_is_adamw_on_the_clipped_gradient() -> None:
    expert = expert_with(learning_rate=0.01, max_grad_norm=0.1, weight_decay=0.1, warmup_steps=0)
    reference = torch.nn.Parameter(torch.tensor(expert.weights()))
    optimizer = torch.optim.AdamW([reference], lr=0.01, weight_decay=0.1)
    batch = collate(blocks(2))
    for _ in range(3):
        expert._gradient([batch], count_targets(batch))
        reference.grad = expert.attached.grad.clone()
        norm = torch.nn.utils.clip_grad_norm_([reference], 0.1)
        optimizer.step()
        result = expert.train_step([batch])
        assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        assert result.grad_norm > 0.1
        np.testing.assert_allclose(expert.weights(), reference.detach().numpy(), atol=1e-6)


def test_the_rate_of_each_step_follows_the_schedule_until_it_ends() -> None:
    expert = expert_with(learning_rate=1.0, warmup_steps=1, lr_scheduler_type="linear", max_steps=3)
    batch = collate(blocks(1))
    assert [expert.train_step([batch]).learning_rate for _ in range(3)] == [1.0, 1.0, 0.5]
    assert expert.finished
    before = expert.weights()
    with pytest.raises(ScheduleEndedError):
        expert.train_step([batch])
    np.testing.assert_array_equal(expert.weights(), before)


def spoil_loss(expert: QwenLoRAExpert) -> None:
    expert.base.model.model.norm.weight.data.fill_(float("nan"))


def spoil_gradient(expert: QwenLoRAExpert) -> None:
    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf")

    next(iter(expert.attached._layers.values())).lora_a.register_hook(spoil)


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_a_step_that_is_not_finite_changes_nothing(spoil: object) -> None:
    expert = expert_with()
    batch = collate(blocks(1))
    expert.train_step([batch])
    weights, state = expert.weights(), expert.optimizer_state()
    spoil(expert)  # type: ignore[operator]
    with pytest.raises(NonFiniteError, match=r"step 2: .*the weights were not changed"):
        expert.train_step([batch])
    np.testing.assert_array_equal(expert.weights(), weights)
    for name, array in expert.optimizer_state().items():
        np.testing.assert_array_equal(array, state[name])
    assert not expert.attached.grad.any()


def test_float16_lowers_its_scale_until_the_gradient_is_finite() -> None:
    expert, reference = expert_with(dtype="fp16", warmup_steps=0), expert_with(warmup_steps=0)
    expert._scale = dataclasses.replace(expert._scale, value=2.0**40)
    batch = collate(blocks(2))
    result, expected = expert.train_step([batch]), reference.train_step([batch])
    assert 1.0 <= expert._scale.value < 2.0**40
    assert result.grad_norm == pytest.approx(expected.grad_norm, rel=0.05)
    restored = expert_with(dtype="fp16")
    restored.load_optimizer_state(expert.optimizer_state())
    assert restored._scale == expert._scale


def test_evaluation_is_the_mean_over_tokens_and_does_not_depend_on_the_batch_size() -> None:
    expert, five = expert_with(), blocks(5)
    progress: list[tuple[int, int]] = []
    together, apart = expert.evaluate(five, 2, lambda *done: progress.append(done)), expert.evaluate(five, 5)
    assert progress == [(2, 5), (4, 5), (5, 5)]
    assert together.loss == pytest.approx(apart.loss, rel=1e-6)
    counts = [count_targets(collate([block])) for block in five]
    assert together.tokens == sum(counts)
    assert together.loss == pytest.approx(np.average(together.block_losses, weights=counts), rel=1e-6)
    assert together.block_losses[3] == pytest.approx(expert.evaluate(five[3:4], 1).loss, rel=1e-5)


def test_evaluation_changes_nothing_and_ignores_dropout() -> None:
    expert = expert_with(dataclasses.replace(LORA, lora_dropout=0.5))
    two = blocks(2)
    expert.train_step([collate(two)])
    before, gradient = expert.weights(), expert.attached.grad.clone()
    assert expert.evaluate(two, 2) == expert.evaluate(two, 2)
    np.testing.assert_array_equal(expert.weights(), before)
    assert torch.equal(expert.attached.grad, gradient)


def test_a_block_without_labels_has_no_loss_of_its_own() -> None:
    two = blocks(2)
    empty = dataclasses.replace(two[1], labels=np.full_like(two[1].labels, MASKED))
    found = expert_with().evaluate([two[0], empty], 2)
    assert np.isnan(found.block_losses[1])
    assert found.loss == pytest.approx(found.block_losses[0])
    with pytest.raises(ValueError, match="nothing to evaluate"):
        expert_with().evaluate([empty], 1)


def batches(count: int) -> list[Batch]:
    return [collate(blocks(2, seed)) for seed in range(count)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_optimizer_state_through_safetensors_gives_the_identical_next_steps(dropout: float) -> None:
    lora = dataclasses.replace(LORA, lora_dropout=dropout)
    expert, fresh = expert_with(lora), expert_with(lora)
    for batch in batches(4):
        expert.train_step([batch])
    weights, kept = expert.weights(), load(save(expert.optimizer_state()))
    expected = [expert.train_step([batch]).loss for batch in batches(3)]
    torch.manual_seed(99)
    fresh.load_weights(weights)
    fresh.load_optimizer_state(kept)
    assert fresh.step == 4
    assert [fresh.train_step([batch]).loss for batch in batches(3)] == expected
    np.testing.assert_array_equal(fresh.weights(), expert.weights())


def test_optimizer_state_of_another_shape_is_refused() -> None:
    expert = expert_with()
    state = expert.optimizer_state()
    with pytest.raises(ValueError, match=r"exp_avg: expected shape .* got \(3,\)"):
        expert.load_optimizer_state(state | {"exp_avg": np.zeros(3, np.float32)})
    with pytest.raises(ValueError, match="step: expected shape"):
        expert.load_optimizer_state({name: array for name, array in state.items() if name != "step"})


def test_a_gateway_of_larger_rank_is_taken_over_and_trains_on() -> None:
    expert = expert_with(warmup_steps=0)
    batch = collate(blocks(2))
    expert.train_step([batch])
    layout = expert.attached.layout.with_rank(12)
    wide = Adapter(layout, 12.0, np.random.default_rng(1).normal(0, 0.05, layout.size).astype(np.float32))
    expert.load_adapter(wide)
    assert expert.manifest.layout.rank == 12
    assert expert.manifest.alpha == 12.0
    assert expert.step == 0
    assert expert.train_step([batch]).loss > expert.train_step([batch]).loss


def test_the_manifest_tells_base_modules_rank_and_alpha() -> None:
    expert = expert_with(LoraConfig(r=2, lora_alpha=6, target_modules=("q_proj", "v_proj")))
    manifest = expert.manifest
    assert manifest.base == expert.base.identity
    assert [module.name for module in manifest.layout.modules] == [
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"
    ]
    assert (manifest.layout.rank, manifest.alpha) == (2, 6.0)


def test_generation_is_greedy_and_uses_the_chat_template() -> None:
    expert = expert_with()
    first = expert.generate("hello", max_new_tokens=5)
    assert expert.generate("hello", max_new_tokens=5) == first
    assert expert.generate("hello", max_new_tokens=5, chat=False) != first
    expert.base.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        expert.generate("hello")


def test_a_model_with_another_attention_is_refused() -> None:
    base = load_base("tiny", "cpu", "fp32")
    base.model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="sdpa"):
        QwenLoRAExpert(base, LORA)


@pytest.mark.gpu
def test_the_gpu_gives_the_cpu_result() -> None:
    batch = collate(blocks(2))
    cpu = expert_with()
    gpu = QwenLoRAExpert(load_base("tiny", "cuda", "fp32"), LORA)
    gpu.load_weights(cpu.weights())
    for _ in range(3):
        assert gpu.train_step([batch]).loss == pytest.approx(cpu.train_step([batch]).loss, rel=1e-4)
    np.testing.assert_allclose(gpu.weights(), cpu.weights(), atol=1e-4)


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france_and_learns() -> None:
    expert = QwenLoRAExpert(load_base("smollm2", "cpu", "auto"), training=TrainingConfig(warmup_steps=1))
    assert "Paris" in expert.generate("What is the capital of France?", max_new_tokens=12)
    tokenizer = expert.base.tokenizer
    assert [tokenizer.decode([t]) for t in tokenizer("x 2025")["input_ids"]] == ["x", " ", "2", "0", "2", "5"]
    ids = np.asarray(tokenizer(" ".join(os.__doc__.split() + time.__doc__.split()))["input_ids"], np.int64)[:256]
    block = pack([TokenizedSample(ids, ids)], 256, 0)[0]
    losses = [expert.train_step([collate([block, block])]).loss for _ in range(4)]
    assert losses[-1] < losses[0] - 0.1
