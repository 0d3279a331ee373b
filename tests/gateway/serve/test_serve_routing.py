"""The model `auto` on real features: prompts like those of an expert's worker go to that expert."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from serve_house import tiny

from fedmoe.gateway.prompt_statistics import PromptStatistics
from fedmoe.gateway.route import SequenceRouter
from fedmoe.gateway.serve.routing import PromptRouter, RouterFilesError, read_router
from fedmoe.models.prompt_features import prompt_features

LETTERS = {"python": range(97, 107), "sql": range(48, 58)}


def prompts(expert: str, seed: int, count: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.choice(list(LETTERS[expert]), 24).tolist() for _ in range(count)]


def write_statistics(folder: Path) -> None:
    for seed, expert in enumerate(LETTERS):
        found = PromptStatistics.of(prompt_features(tiny(), prompts(expert, seed, 64)))
        (folder / f"{expert}.safetensors").write_bytes(found.to_bytes())


def test_prompts_find_their_expert(tmp_path: Path) -> None:
    write_statistics(tmp_path)
    router = read_router(tiny(), tmp_path)
    for expert in LETTERS:
        assert [router.route(tuple(prompt)) for prompt in prompts(expert, 9, 10)].count(expert) >= 9


def test_prompts_that_fit_nobody_well_enough_are_the_gateways() -> None:
    undecided = SequenceRouter(("python", "sql"), np.zeros((64, 2)), np.zeros(2))
    assert PromptRouter(tiny(), undecided).route((97, 98, 99)) is None


def test_a_folder_without_statistics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RouterFilesError, match="no file EXPERT"):
        read_router(tiny(), tmp_path)
    with pytest.raises(RouterFilesError, match="no file EXPERT"):
        read_router(tiny(), tmp_path / "missing")


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    write_statistics(tmp_path)
    (tmp_path / "law.safetensors").write_bytes(b"not statistics")
    with pytest.raises(RouterFilesError, match=r"law\.safetensors"):
        read_router(tiny(), tmp_path)


def test_statistics_of_another_base_model_are_refused(tmp_path: Path) -> None:
    for seed, expert in enumerate(LETTERS):
        features = np.random.default_rng(seed).normal(size=(64, 7)).astype(np.float32)
        (tmp_path / f"{expert}.safetensors").write_bytes(PromptStatistics.of(features).to_bytes())
    with pytest.raises(RouterFilesError, match="7 numbers, this base model's features 64"):
        read_router(tiny(), tmp_path)
