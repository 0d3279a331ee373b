"""Exact arithmetic on adapters as matrices: every operation acts on the product `scale * B @ A`, never on A and B apart.

Averaging the factors is not averaging the models: mean(B) mean(A) differs from mean(BA) by the covariance of B and A.
Everything here works from stacked factors and R x R Gram matrices (R = sum of ranks), so no d x d matrix is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmoe.lora.adapter import Adapter, FloatMatrix, Layout, ModuleShape, ShapeError

Matrix64 = NDArray[np.float64]

# Below this share of the largest eigenvalue a direction is rounding noise of the float64 Gram matrix.
_RELATIVE_FLOOR = 1e-15


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """The adapter whose product is `factor` times this one's; A and alpha stay, B carries the factor."""
    flat = adapter.flat.copy()
    for _, _, b in adapter.layout.factors(flat):
        b *= np.float32(factor)
    return Adapter(adapter.layout, adapter.alpha, flat)


def baked(adapter: Adapter) -> Adapter:
    """The same product with alpha = rank, so that every reader, whatever it thinks of alpha, uses scale 1."""
    if adapter.alpha == adapter.rank:
        return adapter
    rescaled = scaled(adapter, adapter.scale)
    return Adapter(adapter.layout, float(adapter.rank), rescaled.flat)


def stack(terms: Sequence[tuple[float, Adapter]]) -> Adapter:
    """The exact weighted sum of products, sum_k w_k dW_k, as one adapter of rank sum_k r_k with scale 1.

    `[w_1 s_1 B_1 ... w_K s_K B_K] @ [A_1; ...; A_K]`; all adapters must adapt the same modules.
    """
    if not terms:
        raise ShapeError("there is nothing to stack: at least one adapter is needed")
    modules = terms[0][1].layout.modules
    for _, adapter in terms:
        if adapter.layout.modules != modules:
            raise ShapeError("adapters with different modules cannot be stacked; they need one base and target_modules")
    layout = Layout(modules, sum(adapter.rank for _, adapter in terms))
    flat = np.empty(layout.size, np.float32)
    for module, a, b in layout.factors(flat):
        row = 0
        for weight, adapter in terms:
            a_k, b_k = adapter.module(module.name)
            rows = slice(row, row + adapter.rank)
            a[rows] = a_k
            np.multiply(b_k, np.float32(weight * adapter.scale), out=b[:, rows])
            row += adapter.rank
    return Adapter(layout, float(layout.rank), flat)


@dataclass(frozen=True, slots=True)
class Recompressed:
    """An adapter cut to a smaller rank, and what the cut lost.

    `truncation_error` is the relative Frobenius error of the whole product, sqrt(lost energy / energy).
    """

    adapter: Adapter
    truncation_error: float


def recompress(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> Recompressed:
    """The nearest adapter of a smaller rank in the Frobenius norm (Eckart-Young), module by module.

    Give `rank`, or `energy`: the smallest rank that keeps this share of squared singular values in every module.
    Rows of A come out orthonormal, B carries the singular values, the scale is 1.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give either rank or energy")
    cores = [_core(module, a, b, adapter.scale) for module, a, b in adapter.factors()]
    chosen = rank if rank is not None else max(core.rank_for(energy or 1.0) for core in cores)
    if chosen < 1:
        raise ValueError(f"rank must be at least 1, got {chosen}")
    layout = adapter.layout.with_rank(min(chosen, adapter.rank))
    flat = np.zeros(layout.size, np.float32)
    for (_, a, b), core in zip(layout.factors(flat), cores, strict=True):
        core.write(a, b)
    total = sum(float(core.energies.sum()) for core in cores)
    lost = sum(float(core.energies[layout.rank :].sum()) for core in cores)
    return Recompressed(Adapter(layout, float(layout.rank), flat), float(np.sqrt(lost / total)) if total > 0 else 0.0)


@dataclass(frozen=True, slots=True)
class _Core:
    """The singular value decomposition of one product, held in its R x R core.

    With G_B = B'B = H H', the product is Q (H'A) for an orthonormal Q, so H' G_A H = Y S^2 Y' gives the singular
    values, and A' = Z'A, B' = B G_A Z with Z = H Y / S are the right factor (orthonormal) and the left one (times S).
    """

    a: Matrix64
    b: Matrix64
    energies: Matrix64
    into_a: Matrix64
    into_b: Matrix64

    def rank_for(self, energy: float) -> int:
        total = float(self.energies.sum())
        if total == 0:
            return 1
        kept = np.cumsum(self.energies) / total
        return min(int(np.searchsorted(kept, energy - 1e-12)) + 1, len(self.energies))

    def write(self, a: FloatMatrix, b: FloatMatrix) -> None:
        rank = min(a.shape[0], self.into_a.shape[0])
        a[:rank] = self.into_a[:rank] @ self.a
        b[:, :rank] = self.b @ self.into_b[:, :rank]


def _core(module: ModuleShape, a: FloatMatrix, b: FloatMatrix, scale: float) -> _Core:
    a64, b64 = a.astype(np.float64), b.astype(np.float64) * scale
    gram_a, gram_b = a64 @ a64.T, b64.T @ b64
    values_b, vectors_b = np.linalg.eigh(gram_b)
    h = vectors_b * np.sqrt(np.clip(values_b, 0.0, None))
    energies, y = np.linalg.eigh(h.T @ gram_a @ h)
    energies, y = np.clip(energies[::-1], 0.0, None), y[:, ::-1]
    real = energies > _RELATIVE_FLOOR * max(energies[0], np.finfo(np.float64).tiny)
    z = (h @ y)[:, real] / np.sqrt(energies[real])
    return _Core(a64, b64, energies, z.T, gram_a @ z)


def inner_product(left: Adapter, right: Adapter) -> float:
    """<dW_left, dW_right> summed over modules, from r x r Gram matrices: s_l s_r tr(B_l'B_r A_r A_l')."""
    total = 0.0
    for module, a, b in left.factors():
        other_a, other_b = right.module(module.name)
        gram_b = b.T.astype(np.float64) @ other_b.astype(np.float64)
        gram_a = a.astype(np.float64) @ other_a.T.astype(np.float64)
        total += float((gram_b * gram_a).sum())
    return left.scale * right.scale * total


def product_norm(adapter: Adapter) -> float:
    """Frobenius norm of all products together, sqrt(sum over modules of ||s B A||_F^2)."""
    return float(np.sqrt(max(inner_product(adapter, adapter), 0.0)))
