from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedmoe.inference.vllm.server import VllmServer, VllmSettings

# The vLLM server in memory of the arena's tests serves here too.
sys.path.append(str(Path(__file__).parents[2] / "inference"))


@pytest.fixture(scope="session")
def live_vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    """One live server on loopback with the embedded model in float32, and room for a few versions of rank 8."""
    from fedmoe.models.base import prepare_base

    settings = VllmSettings(
        python=Path(os.environ["FEDMOE_VLLM_PYTHON"]), model=prepare_base("smollm2"), max_loras=6, max_rank=8
    )
    with VllmServer(settings, tmp_path_factory.mktemp("vllm") / "server.log") as server:
        yield server
