"""Routers that `fedmoe.gateway.routers.SequenceRouter` is measured against, by prompt and by token; none beats it.

`linear_router` needs labelled prompts, `SpectralRouter` and `SpectralWeights` nothing but the adapters.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedmoe.gateway.routers import SequenceRouter, softmax, wide
from fedmoe.lora.adapter import Adapter, Float64Array, FloatMatrix, ShapeError


class FeatureRouter(Protocol):
    """Turns feature vectors into probabilities of experts."""

    @property
    def names(self) -> tuple[str, ...]:
        """The experts, in name order."""
        ...

    @property
    def width(self) -> int:
        """Numbers in one prompt's features."""
        ...

    def probabilities(self, features: FloatMatrix) -> Float64Array:
        """features (prompts, width) -> (prompts, experts), rows that add up to 1; raises `ShapeError`."""
        ...


def likeliest(router: FeatureRouter, features: FloatMatrix) -> tuple[str, ...]:
    """The likeliest expert of every prompt, however unsure; raises as `FeatureRouter.probabilities` does."""
    return tuple(router.names[place] for place in router.probabilities(features).argmax(axis=1))


def linear_router(features: Mapping[str, FloatMatrix]) -> SequenceRouter:
    """Softmax regression on labelled prompts (prompts, d) of each expert, every expert counting the same.

    Features are scaled to variance 1; the sum of squared weights costs `_DECAY` / 2. Full-batch gradient descent
    with Nesterov's momentum, its step from the largest curvature, so there is nothing to tune. Raises `ShapeError`
    for features of different width and ValueError for an expert without prompts.
    """
    names = tuple(sorted(features))
    if not names:
        raise ValueError("a router needs at least one expert, got none")
    empty = [name for name in names if features[name].ndim != 2 or not len(features[name])]
    if empty:
        raise ValueError(f"every expert needs a matrix with a row for each prompt; not so: {empty[:5]}")
    if len({features[name].shape[1] for name in names}) != 1:
        raise ShapeError(f"features must have one width, got { {name: features[name].shape[1] for name in names} }")
    x = np.concatenate([features[name] for name in names]).astype(np.float64)
    labels = np.repeat(np.arange(len(names)), [len(features[name]) for name in names])
    centre, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.maximum(scale, 1e-3 * np.sqrt(np.square(scale).mean()) + np.finfo(np.float64).tiny)
    weights = _softmax_regression((x - centre) / scale, labels, len(names)) / scale[:, None]
    return SequenceRouter(names, weights, -centre @ weights)


# Enough against a fit to single prompts; not tuned.
_DECAY = 0.01
_STEPS = 300


def _softmax_regression(x: Float64Array, labels: NDArray[np.int64], classes: int) -> Float64Array:
    """Weights (d, classes) without offsets, for centred x (n, d)."""
    share = 1.0 / (classes * np.bincount(labels, minlength=classes))[labels]
    targets = np.eye(classes)[labels]
    heavy = x * share[:, None]
    # The softmax's curvature is at most a half of that of x' x.
    step = 1.0 / (0.5 * float(np.linalg.norm(x * np.sqrt(share)[:, None], 2)) ** 2 + _DECAY)
    weights = previous = np.zeros((x.shape[1], classes))
    for count in range(_STEPS):
        ahead = weights + count / (count + 3) * (weights - previous)
        slope = heavy.T @ (softmax(x @ ahead) - targets) + _DECAY * ahead
        weights, previous = ahead - step * slope, weights
    return weights


@dataclass(frozen=True, eq=False)
class SpectralRouter:
    """The expert whose adapter answers a prompt loudest, from the adapters alone.

    In one module expert e answers x with energy ||B A x||^2 / ||B A||_F^2 = ||P x||^2 with P = H' A / ||B A||_F and
    H H' = B'B, r rows (SpectR, 2025, by way of an r x r Gram matrix). `projections` holds the P of all experts stacked,
    module -> (R, n) float32, rows `starts[e]` to `starts[e + 1]` those of expert e. A prompt's features (R,) are the
    rows' mean energies over modules and positions, see `fedmoe.models.prompt_features.row_energies`.
    """

    names: tuple[str, ...]
    projections: Mapping[str, FloatMatrix]
    starts: tuple[int, ...]
    centre: Float64Array
    spread: Float64Array

    @property
    def width(self) -> int:
        return self.starts[-1]

    @classmethod
    def of(cls, adapters: Mapping[str, Adapter], reference: FloatMatrix | None = None) -> SpectralRouter:
        """The router of these adapters, all for the same modules; raises `ShapeError` otherwise.

        An expert may be louder than another on every text. `reference`, energies (prompts, R) of text of no domain in
        particular, takes that out: scores are then standard deviations above the reference.
        """
        names = tuple(sorted(adapters))
        if not names:
            raise ValueError("a router needs at least one expert, got none")
        if len({adapters[name].layout.modules for name in names}) != 1:
            raise ShapeError("adapters for different modules cannot be compared; they need one base and target_modules")
        modules = adapters[names[0]].layout.modules
        projections = {
            module.name: np.concatenate([_projection(*adapters[name].module(module.name)) for name in names])
            for module in modules
        }
        starts = (0, *np.cumsum([adapters[name].rank for name in names]).tolist())
        router = cls(names, projections, starts, np.zeros(len(names)), np.ones(len(names)))
        if reference is None:
            return router
        loud = router._levels(reference)
        return replace(router, centre=loud.mean(axis=0), spread=np.maximum(loud.std(axis=0), 1e-3))

    def energies(self, rows: FloatMatrix) -> FloatMatrix:
        """Energies of single rows (tokens or prompts, R) -> of whole experts (tokens or prompts, experts)."""
        return np.add.reduceat(wide(rows, self.width), self.starts[:-1], axis=1).astype(np.float32)

    def probabilities(self, features: FloatMatrix) -> Float64Array:
        return softmax((self._levels(features) - self.centre) / self.spread)

    def _levels(self, features: FloatMatrix) -> Float64Array:
        return np.log(np.maximum(self.energies(features).astype(np.float64), 1e-30))


def _projection(a: FloatMatrix, b: FloatMatrix) -> FloatMatrix:
    """P (r, n) with ||P x|| = ||B A x|| / ||B A||_F; zeros for a product of zero."""
    values, vectors = np.linalg.eigh(b.T.astype(np.float64) @ b.astype(np.float64))
    rows = (np.sqrt(np.clip(values, 0.0, None))[:, None] * vectors.T) @ a.astype(np.float64)
    norm = float(np.linalg.norm(rows))
    return np.asarray(rows / norm if norm > 0 else rows, np.float32)


class SpectralWeights:
    """The `top` experts that answer a token loudest, as weights for `MultiLora.mixed`.

    `projections` and `starts` are those of `SpectralRouter`: module -> (R, in), and where each
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
