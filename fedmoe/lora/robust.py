"""What an update must satisfy before it may touch an expert."""

from __future__ import annotations

import numpy as np

from fedmoe.lora.adapter import FloatVector, Layout


def first_not_finite(layout: Layout, flat: FloatVector) -> str | None:
    """The name of the first factor that holds a NaN or an infinity; None if all is finite.

    One dot product decides the usual case: it is finite only if every number is. Where it overflows, each factor
    is looked at, so large but finite numbers pass.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.dot(flat, flat)):
            return None
    for module, a, b in layout.factors(flat):
        for factor, values in (("lora_A", a), ("lora_B", b)):
            if not np.isfinite(values).all():
                return f"{module.name}.{factor}"
    return None
