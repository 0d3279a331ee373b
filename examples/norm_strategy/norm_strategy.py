"""A merge strategy of one's own, `by_norm`: experts that learned more count less, so that none drowns the others.

Install it, then name it: pip install ./examples/norm_strategy && fedmoe coordinator --strategy by_norm
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedmoe.lora.adapter import Adapter


def by_norm(experts: Mapping[str, Adapter]) -> dict[str, float]:
    """Weights that sum to 1, each in inverse proportion to the norm of its expert's product B A."""
    norms = {}
    for name, expert in experts.items():
        products = (np.float64(expert.scale) * (b @ a) for _, a, b in expert.layout.factors(expert.flat))
        # One that learned nothing has no norm to divide by.
        norms[name] = max(1e-12, float(np.sqrt(sum(np.sum(product**2) for product in products))))
    total = sum(1 / norm for norm in norms.values())
    return {name: 1 / norm / total for name, norm in norms.items()}
