"""Rank growth and rescaling of an adapter in training; the function that it computes stays the same."""

from __future__ import annotations

import numpy as np

from fedmoe.lora.adapter import Adapter, FloatVector, Layout, ShapeError, initial_adapter
from fedmoe.lora.algebra import scaled


def grow_rank(adapter: Adapter, rank: int, seed: int) -> Adapter:
    """The same product at a higher rank: new columns of B are zero, new rows of A are drawn as a fresh adapter's.

    alpha grows with the rank, so the scale alpha / rank stays and the old directions are trained as before. Raises
    `ShapeError` for a rank below the present one (cut with `recompress`).
    """
    layout = adapter.layout.with_rank(rank)
    flat = grow_flat(adapter.layout, layout, adapter.flat)
    drawn = initial_adapter(layout, 1.0, seed)
    for (_, a, _), (_, fresh, _) in zip(layout.factors(flat), drawn.factors(), strict=True):
        a[adapter.rank :] = fresh[adapter.rank :]
    return Adapter(layout, adapter.alpha * rank / adapter.rank, flat)


def grow_flat(before: Layout, after: Layout, flat: FloatVector) -> FloatVector:
    """A flat vector laid out at a higher rank, zeros where it is new, float32 (after.size,).

    Made for the two moments of AdamW, whose new entries start at zero like those of a fresh optimizer. The step count
    stays, so a new entry's first step lacks Adam's bias correction and is (1 - beta1) / sqrt(1 - beta2) learning rates
    long: 0.45 at betas 0.9 and 0.95, 3.2 at 0.9 and 0.999. Raises `ShapeError` for other modules or a lower rank.
    """
    if after.modules != before.modules:
        raise ShapeError("the two layouts have different modules; only the rank may grow")
    if after.rank < before.rank:
        raise ShapeError(f"rank {before.rank} cannot grow to {after.rank}; to make it smaller, use recompress")
    grown = np.zeros(after.size, np.float32)
    for (_, a, b), (_, new_a, new_b) in zip(before.factors(flat), after.factors(grown), strict=True):
        new_a[: before.rank] = a
        new_b[:, : before.rank] = b
    return grown


def rescale(adapter: Adapter, alpha: float) -> Adapter:
    """The same product with another alpha: B carries the inverse of the change.

    Under Adam this multiplies the effective learning rate of B by alpha / old alpha and leaves that of A alone: a step
    of B is as long as before and counts that much more in the product. The gradient of B grows by that ratio, so its
    first moment is to be multiplied by it and its second by its square.
    """
    if not np.isfinite(alpha) or alpha <= 0:
        raise ShapeError(f"alpha must be a positive number, got {alpha}")
    return Adapter(adapter.layout, alpha, scaled(adapter, adapter.alpha / alpha).flat)
