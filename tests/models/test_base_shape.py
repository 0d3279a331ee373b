"""What is computed from a base model's settings alone, against the models themselves and their published sizes."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedmoe.models.base_shape import BaseShape
from fedmoe.models.known_bases import KNOWN_BASES
from fedmoe.models.lora_layers import find_targets

TINY = dict(KNOWN_BASES["tiny"])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2", 134_515_008),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1_543_714_304),
        ("Qwen/Qwen2.5-7B-Instruct", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
    ],
)
def test_the_parameters_of_well_known_models(name: str, parameters: int) -> None:
    shape = BaseShape.of(KNOWN_BASES[name])
    assert shape is not None
    assert shape.parameters == parameters


@pytest.mark.parametrize(
    "settings",
    [
        TINY,
        TINY | {"model_type": "llama", "tie_word_embeddings": False, "head_dim": 8},
        TINY | {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
        TINY | {"model_type": "mistral", "head_dim": 16},
        TINY | {"model_type": "qwen3", "head_dim": 32, "attention_bias": True},
    ],
)
def test_parameters_and_modules_are_those_of_the_model_itself(settings: Mapping[str, object]) -> None:
    shape = BaseShape.of(settings)
    assert shape is not None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    modules = [(name, module.in_features, module.out_features) for name, module in find_targets(model, "all-linear")]
    assert [(module.name, module.in_features, module.out_features) for module in shape.modules] == modules


@pytest.mark.parametrize("change", [{"model_type": "gpt2"}, {"hidden_size": None}, {"num_hidden_layers": "2"}])
def test_a_family_that_is_not_known_has_no_shape(change: dict[str, object]) -> None:
    assert BaseShape.of(TINY | change) is None
