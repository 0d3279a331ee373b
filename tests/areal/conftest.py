from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmoe.areal.config import ArealConfig


@pytest.fixture(scope="session")
def base_folder() -> Path:
    """The tiny base model as a folder."""
    from fedmoe.models.base import prepare_base

    return prepare_base("tiny")


@pytest.fixture
def config(base_folder: Path) -> ArealConfig:
    """A learner of the tiny base model that moves visibly in one step."""
    return ArealConfig(str(base_folder), rank=4, alpha=8, learning_rate=1e-2)


@pytest.fixture
def no_process_group() -> Iterator[None]:
    """Leaves no process group behind, whatever the test did."""
    import torch.distributed as dist

    yield
    if dist.is_initialized():
        dist.destroy_process_group()
