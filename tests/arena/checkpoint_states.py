"""What tests of checkpoints share: small states by number, saved and compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from fedmoe.arena.run.checkpoint import ArenaState, save
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape

NOON = 1_769_860_800.0  # 2026-01-31 12:00:00 UTC
NO_COPIES: Mapping[str, Path] = MappingProxyType({})
LAYOUT = Layout((ModuleShape("layers.0.q", 5, 3), ModuleShape("layers.0.v", 5, 4)), 2)


def adapter(seed: int, alpha: float = 4.0, layout: Layout = LAYOUT) -> Adapter:
    return Adapter(layout, alpha, np.random.default_rng(seed).normal(size=layout.size).astype(np.float32))


def state(iteration: int = 1) -> ArenaState:
    rng = np.random.default_rng(iteration)
    return ArenaState(
        iteration=iteration,
        config={"task": "reasoning:chain_sum", "seed": 7},
        state={"baselines": {"a": 0.1 + 0.2}, "mode": "mixed", "counters": [1, 2], "best": -math.inf, "none": None},
        arrays={name: rng.normal(size=400).astype(np.float32) for name in ("solver/m", "solver/v", "critic/m")},
        adapters={f"solver@{iteration}": adapter(iteration), f"solver@{iteration + 1}": adapter(iteration + 1)},
        records_bytes=123 * iteration,
    )


def saved(
    folder: Path, iteration: int = 1, now: float = NOON, copies: Mapping[str, Path] = MappingProxyType({})
) -> Path:
    metrics = {"reward": {"solver": 0.5}}
    return save(folder, state(iteration), metrics=metrics, base_model="base", now=now, copies=copies)


def assert_same(one: ArenaState, other: ArenaState) -> None:
    assert (one.iteration, one.config, one.state) == (other.iteration, other.config, other.state)
    assert one.records_bytes == other.records_bytes
    assert list(one.arrays) == list(other.arrays)
    assert list(one.adapters) == list(other.adapters)
    for name, array in one.arrays.items():
        assert array.tobytes() == other.arrays[name].tobytes()
    for key, value in one.adapters.items():
        twin = other.adapters[key]
        assert (value.layout, value.alpha) == (twin.layout, twin.alpha)
        assert value.flat.tobytes() == twin.flat.tobytes()
