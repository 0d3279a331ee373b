"""The loss matrix: base, experts and a gateway of a higher rank on the same blocks."""

from __future__ import annotations

import numpy as np
import pytest

from fedmoe.datasets.packing import pack
from fedmoe.datasets.render import TokenizedSample
from fedmoe.gateway.evaluate import BASE, evaluate
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.algebra import stack
from fedmoe.models.base import load_base
from fedmoe.models.schedule import LoraConfig
from fedmoe.qwen_finetune import QwenLoRAExpert


def test_the_matrix_scores_every_adapter_on_every_domain() -> None:
    base = load_base("tiny", "cpu", "fp32")
    expert = QwenLoRAExpert(base, LoraConfig(r=4, lora_alpha=8.0))
    layout, alpha = expert.attached.layout, float(expert.attached.alpha)
    expert.attached.detach()
    random = np.random.default_rng(0)
    one, two = (Adapter(layout, alpha, random.normal(0, 0.2, layout.size).astype(np.float32)) for _ in range(2))
    gateway = stack([(0.5, one), (0.5, two)])
    ids = [random.integers(3, 200, 40) for _ in range(4)]
    blocks = pack([TokenizedSample(tokens, tokens.copy()) for tokens in ids], 64, seed=0)
    matrix = evaluate(base, {"one": one, "two": two, "gateway": gateway}, {"left": blocks[:2], "right": blocks[2:]})
    assert list(matrix.losses) == [BASE, "one", "two", "gateway"]
    assert matrix.tokens == {"left": 78, "right": 78}
    seen = {round(losses[domain], 6) for losses in matrix.losses.values() for domain in losses}
    assert len(seen) == 8
    alone = QwenLoRAExpert(base, LoraConfig(r=8, lora_alpha=8.0))
    alone.load_adapter(gateway)
    assert alone.evaluate(blocks[2:], 1).loss == pytest.approx(matrix.losses["gateway"]["right"], rel=1e-5)
