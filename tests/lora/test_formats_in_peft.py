"""The PEFT folder in PEFT itself, on a tiny random Qwen2 made in code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lora_cases import dense, distance, norm, random_flat
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.formats import PEFT_CONFIG, PEFT_WEIGHTS, peft_files, read_peft

# PEFT 0.21 asks transformers 5 for a name that is on its way out; it is not ours to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TARGETS = ["q_proj", "v_proj", "down_proj"]
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def tiny_qwen2() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).eval()


def adapter_for(model: Qwen2ForCausalLM, rank: int, alpha: float) -> Adapter:
    modules = tuple(
        ModuleShape(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in TARGETS
    )
    layout = Layout(modules, rank)
    return Adapter(layout, alpha, random_flat(layout, 1) * np.float32(0.2))


def write(files: dict[str, bytes], folder: Path) -> str:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return str(folder)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(TOKENS).logits)


def logits_by_hand(adapter: Adapter) -> torch.Tensor:
    model = tiny_qwen2()
    weights = dict(model.named_parameters())
    for name, product in dense(adapter).items():
        weights[f"{name}.weight"].data.add_(torch.from_numpy(product.astype(np.float32)))
    return logits(model)


@pytest.mark.parametrize("alpha", [4.0, 10.0])
def test_peft_gives_the_logits_of_base_plus_b_a(alpha: float, tmp_path: Path) -> None:
    adapter = adapter_for(tiny_qwen2(), 4, alpha)
    loaded = PeftModel.from_pretrained(tiny_qwen2(), write(peft_files(adapter, "tiny"), tmp_path)).eval()
    expected = logits_by_hand(adapter)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    assert float((logits(tiny_qwen2()) - expected).abs().max()) > 0.1


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_that_peft_saved_is_read_with_its_scale(rslora: bool, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, use_rslora=rslora, init_lora_weights=False)
    model = get_peft_model(tiny_qwen2(), config).eval()
    model.save_pretrained(str(tmp_path))
    adapter = read_peft({name: (tmp_path / name).read_bytes() for name in (PEFT_CONFIG, PEFT_WEIGHTS)})
    assert adapter.scale == pytest.approx(6 / (2 if rslora else 4))
    assert adapter.layout == adapter_for(tiny_qwen2(), 4, 1.0).layout
    torch.testing.assert_close(logits(model), logits_by_hand(adapter), rtol=1e-5, atol=1e-5)
    again = read_peft(peft_files(adapter, "tiny"))
    assert distance(dense(again), dense(adapter)) <= 1e-6 * norm(dense(adapter))
