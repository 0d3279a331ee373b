"""Diagnostics before a merge: how large experts are, how much their subspaces overlap, which rank their sum needs.

All of it comes from the factors, by r x r Gram matrices; no data is asked for and no d x d matrix is formed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from fedmoe.lora.adapter import Adapter, Float64Array, FloatMatrix, ShapeError
from fedmoe.lora.algebra import product_norm, recompress, stack

#: The share of squared singular values that a predicted rank keeps in every module.
ENERGY = 0.99
# Directions below this share of the largest eigenvalue of a normalised Gram matrix are rounding, not a space.
_INDEPENDENT = 1e-10


@dataclass(frozen=True, slots=True)
class Overlap:
    """Cosines of the principal angles between two spaces, over all modules: 1 is the same direction, 0 is separate."""

    median: float
    maximum: float


@dataclass(frozen=True, slots=True)
class PairAudit:
    """Two experts' overlap: of inputs they read (row spaces of A), of outputs they write (column spaces of B)."""

    first: str
    second: str
    inputs: Overlap
    outputs: Overlap


@dataclass(frozen=True)
class MergeAudit:
    """Diagnostics of experts before a merge.

    `norms` are Frobenius norms of the whole products, `predicted_rank` is the rank at which the plain sum keeps
    `energy` of every module's squared singular values, `stacked_rank` the one that loses nothing.
    """

    norms: dict[str, float]
    pairs: list[PairAudit]
    stacked_rank: int
    predicted_rank: int
    energy: float


def audit(experts: Mapping[str, Adapter], energy: float = ENERGY) -> MergeAudit:
    """Norms, overlaps of every pair and the predicted rank, in name order.

    Raises `ShapeError` for no experts or for experts of different modules.
    """
    if not experts:
        raise ShapeError("there is no expert to audit: at least one is needed")
    ordered = {name: experts[name] for name in sorted(experts)}
    stacked = stack([(1.0, expert) for expert in ordered.values()])
    return MergeAudit(
        {name: product_norm(expert) for name, expert in ordered.items()},
        _pairs(ordered),
        stacked.rank,
        recompress(stacked, energy=energy).adapter.rank,
        energy,
    )


def _pairs(experts: Mapping[str, Adapter]) -> list[PairAudit]:
    inputs: dict[tuple[str, str], list[float]] = {pair: [] for pair in combinations(experts, 2)}
    outputs: dict[tuple[str, str], list[float]] = {pair: [] for pair in inputs}
    for module in next(iter(experts.values())).layout.modules:
        # One module at a time: the orthonormal bases of ten experts of a large model would be gigabytes.
        factors = {name: expert.module(module.name) for name, expert in experts.items()}
        rows = {name: _basis(a.T) for name, (a, _) in factors.items()}
        columns = {name: _basis(b) for name, (_, b) in factors.items()}
        for first, second in inputs:
            inputs[first, second] += _cosines(rows[first], rows[second])
            outputs[first, second] += _cosines(columns[first], columns[second])
    return [PairAudit(*pair, _overlap(inputs[pair]), _overlap(outputs[pair])) for pair in inputs]


def _basis(tall: FloatMatrix) -> Float64Array:
    """Orthonormal columns that span the columns of `tall`; none for zeros."""
    wide = tall.astype(np.float64)
    norms = np.linalg.norm(wide, axis=0)
    wide = wide[:, norms > 0] / norms[norms > 0]
    if not wide.size:
        return np.zeros((len(tall), 0))
    values, vectors = np.linalg.eigh(wide.T @ wide)
    real = values > _INDEPENDENT * values[-1]
    basis: Float64Array = wide @ (vectors[:, real] / np.sqrt(values[real]))
    return basis


def _cosines(left: Float64Array, right: Float64Array) -> list[float]:
    if not left.size or not right.size:
        return []
    cosines = np.linalg.svd(left.T @ right, compute_uv=False)
    return [min(float(cosine), 1.0) for cosine in cosines]


def _overlap(cosines: list[float]) -> Overlap:
    """Zeros where one of the two changes nothing anywhere: an empty space shares no direction."""
    return Overlap(statistics.median(cosines), max(cosines)) if cosines else Overlap(0.0, 0.0)
