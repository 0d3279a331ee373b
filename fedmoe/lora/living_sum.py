"""Experts' deltas folded into the gateway they left, where their input moments are not known: a scaled plain sum.

W <- W + c sum_e w_e (W_e - W_s): exact in the product, then cut to the gateway's rank in the Frobenius norm.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedmoe.lora.adapter import Adapter
from fedmoe.lora.algebra import recompress, stack
from fedmoe.lora.living import Departed, Folded, nearest_factors

#: What the deltas are multiplied with where several experts share the gateway; measured beside 1.2 with moments.
SUM_SCALE = 0.7


def fold_sum(gateway: Adapter, ready: Mapping[str, Departed], several: bool) -> Folded:
    """The gateway with the deltas of the `ready` experts; `several` says that it is shared, by these or others.

    Rank, alpha and layout stay. Raises `ShapeError` for adapters of other modules.
    """
    scale = SUM_SCALE if several else 1.0
    named = ((name, ready[name]) for name in sorted(ready))
    moved = {name: one for name, one in named if one.weight and not np.array_equal(one.now.flat, one.start.flat)}
    if not moved:
        return Folded(gateway, 0.0)
    terms = [(1.0, gateway)]
    for departed in moved.values():
        share = scale * departed.weight
        terms += [(share, departed.now), (-share, departed.start)]
    cut = recompress(stack(terms), gateway.rank)
    flat = np.empty_like(gateway.flat)
    for module, a, b in gateway.layout.factors(flat):
        a_cut, b_cut = cut.adapter.module(module.name)
        b_cut = b_cut * np.float32(cut.adapter.scale / gateway.scale)
        a[...], b[...] = nearest_factors(a_cut, b_cut, _where_experts_are(gateway, moved, module.name, scale))
    return Folded(Adapter(gateway.layout, gateway.alpha, flat), cut.truncation_error)


def _where_experts_are(
    gateway: Adapter, moved: Mapping[str, Departed], module: str, scale: float
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The rows of A that the next factors should be near: the gateway's, moved as the experts moved theirs."""
    target = gateway.module(module)[0].astype(np.float64)
    for departed in moved.values():
        step = departed.now.module(module)[0].astype(np.float64) - departed.start.module(module)[0]
        target += scale * departed.weight * step
    return target
