"""Token-level routing: experts chosen for every token and module from the adapters alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch

from fedmoe.lora.adapter import FloatMatrix


class SpectralWeights:
    """The `top` experts that answer a token loudest, as weights for `MultiLora.mixed`.

    `projections` and `starts` are those of `fedmoe.gateway.routers.SpectralRouter`: module -> (R, in), and where each
    expert's rows begin, R last. An expert's weight is its share of the energies of the `top` loudest.
    """

    def __init__(
        self, projections: Mapping[str, FloatMatrix], starts: Sequence[int], top: int, device: torch.device
    ) -> None:
        experts = len(starts) - 1
        if not 1 <= top <= experts:
            raise ValueError(f"of {experts} experts 1 to {experts} can be taken, got {top}")
        self._projections = {module: torch.from_numpy(rows).to(device) for module, rows in projections.items()}
        ranks = torch.tensor([stop - start for start, stop in itertools.pairwise(starts)])
        owner = torch.repeat_interleave(torch.arange(experts), ranks)
        self._owners = torch.nn.functional.one_hot(owner, experts).to(device, torch.float32)
        self._top = top

    def __call__(self, module: str, x: torch.Tensor) -> torch.Tensor:
        """x (rows, positions, in) -> weights (rows, positions, experts), float32, adding up to 1."""
        energies = (x.float() @ self._projections[module].T).square() @ self._owners
        loudest = energies.topk(self._top, dim=-1)
        weights = torch.zeros_like(energies).scatter_(-1, loudest.indices, loudest.values.clamp_min(1e-30))
        return weights / weights.sum(dim=-1, keepdim=True)
