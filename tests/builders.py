"""What tests of every component are made of: adapters, files of rows; and waiting for what comes about."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fedmoe.lora.adapter import Adapter, Layout, ModuleShape


def random_adapter(layout: Layout, seed: int = 0, spread: float = 0.1, alpha: float | None = None) -> Adapter:
    """A and B both normal around zero; `alpha` is twice the rank where none is given."""
    flat = np.random.default_rng(seed).normal(0.0, spread, layout.size).astype(np.float32)
    return Adapter(layout, 2.0 * layout.rank if alpha is None else alpha, flat)


def smollm2_layout(rank: int = 8) -> Layout:
    """All linear layers of SmolLM2-135M."""
    attention = {"q": (576, 576), "k": (576, 192), "v": (576, 192), "o": (576, 576)}
    feed_forward = {"gate": (576, 1536), "up": (576, 1536), "down": (1536, 576)}
    sizes = {f"self_attn.{name}_proj": size for name, size in attention.items()}
    sizes |= {f"mlp.{name}_proj": size for name, size in feed_forward.items()}
    return Layout(
        tuple(ModuleShape(f"model.layers.{i}.{name}", *size) for i in range(30) for name, size in sizes.items()), rank
    )


def write_rows(path: Path, *rows: object) -> Path:
    """A file with one JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Return once it is so; fails if it never comes about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
