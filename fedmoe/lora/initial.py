"""Where an expert starts: A random, B zero, so the product is zero and the first gradient is not."""

from __future__ import annotations

import numpy as np

from fedmoe.lora.adapter import Adapter, Layout


def initial_adapter(layout: Layout, alpha: float, seed: int) -> Adapter:
    """PEFT's default start drawn from a seed: A ~ U(-1/sqrt(in), 1/sqrt(in)), B = 0.

    Each module has its own stream, keyed by its place, so the same seed gives the same A for the same layout.
    """
    flat = np.zeros(layout.size, np.float32)
    streams = np.random.SeedSequence(seed).spawn(len(layout.modules))
    for (module, a, _), stream in zip(layout.factors(flat), streams, strict=True):
        bound = 1.0 / np.sqrt(module.in_features)
        a[...] = np.random.default_rng(stream).uniform(-bound, bound, a.shape)
    return Adapter(layout, alpha, flat)
