"""Data statistics of random inputs, and how a worker sends them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from live import push_headers
from starlette.testclient import TestClient
from support import LAYOUT

from fedmoe.coordinator import Aggregation
from fedmoe.lora.adapter import FloatMatrix
from fedmoe.lora.moments import InputMoments, ModuleMoments, omega
from fedmoe.lora.prompt_statistics import PromptStatistics

PUSH = "/push_data_statistics"
REGMEAN = Aggregation(strategy="regmean")
Sizes = Mapping[str, int]
SIZES = {module.name: module.in_features for module in LAYOUT.modules}


def inputs(seed: int, features: int = 6, rows: int = 50) -> FloatMatrix:
    random = np.random.default_rng(seed)
    drawn: FloatMatrix = (random.normal(size=(rows, features)) * random.uniform(0.1, 3, features)).astype(np.float32)
    return drawn


def moments(seed: int, sizes: Sizes = SIZES, columns: int = 3, tokens: int = 5_000) -> InputMoments:
    """Moments of random inputs, the same for every module of a size, as those of query and value are."""
    modules = {}
    for name, features in sizes.items():
        x = inputs(seed, features)
        gram: FloatMatrix = x.T @ x / np.float32(len(x))
        modules[name] = ModuleMoments(np.square(x).mean(axis=0), gram @ omega(0, name, features, columns))
    return InputMoments(modules, tokens, 0)


def prompts(seed: int, width: int = 5) -> PromptStatistics:
    return PromptStatistics.of(inputs(seed, width, 20))


def body_of(kind: str, seed: int) -> bytes:
    return moments(seed).to_bytes() if kind == "moments" else prompts(seed).to_bytes()


def send(
    client: TestClient, kind: str, body: bytes, worker: str = "w1", expert: str = "python", **headers: str
) -> tuple[int, dict[str, object]]:
    """Push statistics; status and answer."""
    answer = client.post(
        PUSH,
        params={"expert": expert, "worker": worker, "kind": kind},
        content=body,
        headers=push_headers(body) | {name.replace("_", "-"): value for name, value in headers.items()},
    )
    return answer.status_code, answer.json()
