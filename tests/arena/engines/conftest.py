from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmoe.arena.engines.vllm_server import VllmServer, VllmSettings, loras_needed

POLICIES, STALENESS, RANK = 3, 1, 8


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """One live server on loopback for all tests, with the embedded model in float32."""
    from fedmoe.models.base import prepare_base

    settings = VllmSettings(
        python=Path(os.environ["FEDMOE_VLLM_PYTHON"]),
        model=prepare_base("smollm2"),
        max_loras=loras_needed(POLICIES, STALENESS),
        max_rank=RANK,
    )
    with VllmServer(settings, tmp_path_factory.mktemp("vllm") / "server.log") as server:
        yield server
