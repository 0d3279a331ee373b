import warnings

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fedmoe.lora.adapter import Adapter, ShapeError
from fedmoe.models.lora_layers import AttachedAdapter, LoraLinear, TargetError, attach
from fedmoe.models.packed import enable_checkpointing
from fedmoe.models.tiny import tiny_model

INPUTS = torch.arange(24).reshape(2, 12)
SEVEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model().requires_grad_(False).eval()


@pytest.fixture
def attached(model: PreTrainedModel) -> AttachedAdapter:
    adapter = attach(model, "all-linear", rank=4, alpha=8.0)
    adapter.write(noise(adapter.layout.size))
    return adapter


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, size).astype(np.float32)


def loss_of(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=INPUTS, labels=INPUTS).loss


@pytest.fixture
def reference(attached: AttachedAdapter) -> peft.PeftModel:
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's use of a name that transformers is renaming
        other = peft.get_peft_model(tiny_model().eval(), config)
    state = {}
    for module, a, b in attached.adapter().factors():
        state[f"base_model.model.{module.name}.lora_A.weight"] = torch.tensor(a)
        state[f"base_model.model.{module.name}.lora_B.weight"] = torch.tensor(b)
    found = peft.set_peft_model_state_dict(other, state)
    assert not found.unexpected_keys
    return other


def test_logits_equal_those_of_peft(
    model: PreTrainedModel, attached: AttachedAdapter, reference: peft.PeftModel
) -> None:
    mine, theirs = model(INPUTS).logits, reference(INPUTS).logits
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    attached.detach()
    assert not torch.allclose(model(INPUTS).logits, theirs, atol=1e-2)


def test_gradients_equal_those_of_peft(
    model: PreTrainedModel, attached: AttachedAdapter, reference: peft.PeftModel
) -> None:
    loss_of(model).backward()
    loss_of(reference).backward()
    theirs = {name: parameter.grad for name, parameter in reference.named_parameters() if parameter.grad is not None}
    assert len(theirs) == 2 * len(attached.layout.modules)
    for module, a, b in attached.layout.factors(attached.grad.numpy()):
        for factor, mine in (("lora_A", a), ("lora_B", b)):
            gradient = theirs[f"base_model.model.{module.name}.{factor}.default.weight"]
            assert gradient.abs().max() > 0
            np.testing.assert_allclose(mine, gradient.numpy(), atol=1e-5, rtol=1e-4)


def test_what_is_written_is_read_and_used(model: PreTrainedModel, attached: AttachedAdapter) -> None:
    flat = noise(attached.layout.size, seed=1)
    attached.write(flat)
    np.testing.assert_array_equal(attached.read(), flat)
    for module, a, b in attached.adapter().factors():
        layer = model.get_submodule(module.name)
        np.testing.assert_array_equal(layer.lora_a.detach().numpy(), a)
        np.testing.assert_array_equal(layer.lora_b.detach().numpy(), b)
        assert layer.lora_a.is_leaf
        assert layer.lora_b.is_leaf


def test_what_is_read_is_a_copy(attached: AttachedAdapter) -> None:
    copy = attached.read()
    copy[:] = 7
    assert not np.any(attached.read() == 7)


def test_one_optimizer_step_on_the_flat_parameter_moves_the_layers(
    model: PreTrainedModel, attached: AttachedAdapter
) -> None:
    before = loss_of(model)
    optimizer = torch.optim.SGD([attached.parameter], lr=0.05)
    before.backward()
    optimizer.step()
    assert loss_of(model) < before


def test_gradients_add_up_until_they_are_zeroed(model: PreTrainedModel, attached: AttachedAdapter) -> None:
    loss_of(model).backward()
    once = attached.grad.clone()
    loss_of(model).backward()
    torch.testing.assert_close(attached.grad, 2 * once)
    attached.zero_grad()
    assert not attached.grad.any()
    loss_of(model).backward()
    torch.testing.assert_close(attached.grad, once)


def test_only_the_factors_are_trained(model: PreTrainedModel, attached: AttachedAdapter) -> None:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{m.name}.lora_{f}" for m in attached.layout.modules for f in "ab"}


def test_all_linear_leaves_the_output_head_out(attached: AttachedAdapter) -> None:
    ends = {module.name.rpartition(".")[2] for module in attached.layout.modules}
    assert sorted(ends) == SEVEN


@pytest.mark.parametrize(
    ("targets", "count"), [("q_proj", 2), (("q_proj", "mlp.up_proj"), 4), ("model.layers.1.self_attn.k_proj", 1)]
)
def test_targets_match_the_end_of_a_name(model: PreTrainedModel, targets: str | tuple[str, ...], count: int) -> None:
    assert len(attach(model, targets, 2, 4.0).layout.modules) == count


def test_an_unknown_target_names_what_exists(model: PreTrainedModel) -> None:
    with pytest.raises(TargetError, match=r"'proj'.*down_proj, gate_proj.*all-linear"):
        attach(model, ("q_proj", "proj"), 2, 4.0)
    with pytest.raises(TargetError, match="empty"):
        attach(model, (), 2, 4.0)


def test_a_second_adapter_is_refused_until_the_first_is_detached(
    model: PreTrainedModel, attached: AttachedAdapter
) -> None:
    with pytest.raises(TargetError, match="detach it first"):
        attach(model, "all-linear", 2, 4.0)
    attached.detach()
    assert not any(isinstance(module, LoraLinear) for module in model.modules())
    torch.testing.assert_close(model(INPUTS).logits, tiny_model().eval()(INPUTS).logits, rtol=0, atol=0)
    attach(model, "all-linear", 2, 4.0)


def test_an_adapter_of_another_rank_and_alpha_is_taken_over(model: PreTrainedModel, attached: AttachedAdapter) -> None:
    wide = Adapter(attached.layout.with_rank(12), 3.0, noise(attached.layout.size * 3))
    attached.load(wide)
    np.testing.assert_array_equal(attached.adapter().flat, wide.flat)
    assert (attached.adapter().rank, attached.alpha) == (12, 3.0)
    layer = model.get_submodule("model.layers.0.self_attn.q_proj")
    a, b = (torch.tensor(factor) for factor in wide.module("model.layers.0.self_attn.q_proj"))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 3.0 / 12 * x @ a.T @ b.T, atol=1e-5, rtol=1e-4)
    loss_of(model).backward()
    assert attached.grad.shape == (wide.layout.size,)
    assert attached.grad.any()


def test_another_alpha_at_the_same_rank_changes_the_scale(model: PreTrainedModel, attached: AttachedAdapter) -> None:
    attached.load(Adapter(attached.layout, 20.0, attached.read()))
    assert model.get_submodule("model.layers.0.mlp.up_proj").scale == 5.0


def test_an_adapter_for_other_modules_is_refused(attached: AttachedAdapter) -> None:
    other = attach(tiny_model(), "q_proj", 4, 8.0).adapter()
    with pytest.raises(ShapeError, match="missing or of other shape"):
        attached.load(other)
    with pytest.raises(ShapeError, match="float32 numbers"):
        attached.write(np.zeros(3, np.float32))


def test_gradient_checkpointing_gives_the_same_gradient(model: PreTrainedModel, attached: AttachedAdapter) -> None:
    model.train()
    loss_of(model).backward()
    plain = attached.grad.clone()
    attached.zero_grad()
    enable_checkpointing(model)
    loss_of(model).backward()
    torch.testing.assert_close(attached.grad, plain)


def test_autocast_computes_in_bf16_and_keeps_float32_gradients(
    model: PreTrainedModel, attached: AttachedAdapter
) -> None:
    expected = loss_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model)
    loss.backward()
    assert attached.grad.dtype == torch.float32
    assert attached.grad.any()
    assert 0 < abs(loss.item() - expected.item()) < 0.05


def test_a_bf16_base_works_without_autocast(attached: AttachedAdapter) -> None:
    linear = nn.Linear(8, 6, dtype=torch.bfloat16)
    box = nn.ModuleDict({"only": linear})
    adapter = attach(box, "only", 2, 2.0)
    adapter.write(noise(adapter.layout.size))
    y = box["only"](torch.ones(3, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert not torch.equal(y, linear(torch.ones(3, 8, dtype=torch.bfloat16)))


def test_dropout_acts_in_training_only(model: PreTrainedModel) -> None:
    adapter = attach(model, "all-linear", 4, 8.0, dropout=0.5)
    adapter.write(noise(adapter.layout.size))
    assert torch.equal(model(INPUTS).logits, model(INPUTS).logits)
    model.train()
    assert not torch.equal(model(INPUTS).logits, model(INPUTS).logits)


def test_the_start_changes_nothing_and_follows_from_the_seed(model: PreTrainedModel) -> None:
    expected = model(INPUTS).logits
    first = attach(model, "all-linear", 4, 8.0, seed=3)
    torch.testing.assert_close(model(INPUTS).logits, expected, rtol=0, atol=0)
    same, other = (attach(tiny_model(), "all-linear", 4, 8.0, seed=seed).read() for seed in (3, 4))
    np.testing.assert_array_equal(first.read(), same)
    assert not np.array_equal(first.read(), other)


def test_views_that_were_cut_loose_are_noticed(model: PreTrainedModel, attached: AttachedAdapter) -> None:
    model.to(torch.float64)
    with pytest.raises(RuntimeError, match="no longer share"):
        attached.read()
    with pytest.raises(RuntimeError, match="no longer share"):
        attached.write(np.zeros(attached.layout.size, np.float32))


def test_gradients_that_were_set_to_none_are_noticed(model: PreTrainedModel, attached: AttachedAdapter) -> None:
    model.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match=r"AttachedAdapter\.zero_grad"):
        attached.read()
