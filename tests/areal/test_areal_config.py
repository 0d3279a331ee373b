import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save

from fedmoe.areal.config import ArealConfig, ArealError, check_base_folder
from fedmoe.arena.learning.config import LossConfig


def test_a_configuration_comes_back_from_json() -> None:
    config = ArealConfig(
        "/models/base",
        4,
        8,
        3e-4,
        loss=LossConfig(aggregation="sequence_mean", clip_high=0.3),
        temperature=0.7,
        tokens_per_micro_batch=None,
    )
    assert ArealConfig.from_json(config.as_json()) == config


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"rank": 4}', "null"])
def test_another_json_is_refused(text: str) -> None:
    with pytest.raises(ArealError, match="not the configuration"):
        ArealConfig.from_json(text)


def test_an_unknown_key_is_refused() -> None:
    values = json.loads(ArealConfig("x").as_json())
    with pytest.raises(ArealError, match="surprise"):
        ArealConfig.from_json(json.dumps({**values, "surprise": 1}))


@pytest.mark.parametrize("changes", [{"rank": 0}, {"alpha": 0}, {"alpha": 16.5}])
def test_rank_and_alpha_are_whole_numbers(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(ArealConfig("x"), **changes)


@pytest.mark.parametrize("changes", [{"learning_rate": 0.0}, {"learning_rate": float("nan")}, {"max_grad_norm": 0.0}])
def test_an_optimizer_that_cannot_step_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        replace(ArealConfig("x"), **changes)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (LossConfig(loss="reinforce"), "computes the loss decoupled"),
        (LossConfig(aggregation="constant"), "aggregates by"),
    ],
)
def test_a_loss_that_areal_does_not_have_is_refused_not_approximated(loss: LossConfig, words: str) -> None:
    with pytest.raises(ArealError, match=words):
        ArealConfig("x", loss=loss)


@pytest.mark.parametrize("name", ["temperature", "epochs", "tokens_per_micro_batch"])
def test_counts_and_temperature_are_positive(name: str) -> None:
    values = json.loads(ArealConfig("x").as_json())
    with pytest.raises(ArealError, match=name):
        ArealConfig.from_json(json.dumps({**values, name: 0}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(save({}))
    return tmp_path


def test_a_complete_folder_is_taken(folder: Path) -> None:
    check_base_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    os.remove(folder / name)
    with pytest.raises(ArealError, match=name):
        check_base_folder(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_with_code_of_its_own_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text('{"auto_map": {"AutoModelForCausalLM": "evil.Model"}}')
    with pytest.raises(ArealError, match="code of its own"):
        check_base_folder(folder)


def test_a_file_that_is_no_json_object_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("[1")
    with pytest.raises(ArealError, match=r"config\.json is not a JSON object"):
        check_base_folder(folder)
