from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_vllm import MODEL, FakeVllm
from vllm_bench import POLICIES, RANK, STALENESS, Make

from fedmoe.inference.vllm.engine import VllmEngine
from fedmoe.inference.vllm.server import VllmServer, VllmSettings, loras_needed


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


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Engines on a fake server, closed at the end."""
    made: list[VllmEngine] = []

    def engine(
        fake: FakeVllm,
        folder: str = "adapters",
        token: str | None = None,
        timeout: float = 10.0,
        concurrency: int = 64,
    ) -> VllmEngine:
        made.append(
            VllmEngine(
                "http://fake",
                MODEL,
                tmp_path / folder,
                token=token,
                timeout=timeout,
                concurrency=concurrency,
                transport=fake.transport,
                attempts=2,
            )
        )
        return made[-1]

    yield engine
    for one in made:
        one.close()
