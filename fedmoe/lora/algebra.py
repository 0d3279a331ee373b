"""Exact algebra of adapters: operations act on the products `scale * B @ A`, never on A and B apart.

Averaging the factors is not averaging the models: mean(B) mean(A) differs from mean(BA) by the covariance of B and A.
Everything here works from stacked factors and R x R Gram matrices (R = sum of ranks), so no d x d matrix is formed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.lora.adapter import Adapter, Float64Array, FloatMatrix, Layout, ShapeError

# Below this share of the largest eigenvalue a direction is rounding noise of the float64 Gram matrix.
_RELATIVE_FLOOR = 1e-15


def scaled(adapter: Adapter, factor: float) -> Adapter:
    """The adapter whose product is `factor` times this one's; A and alpha stay, B carries the factor."""
    flat = adapter.flat.copy()
    for _, _, b in adapter.layout.factors(flat):
        b *= _single(factor)
    return Adapter(adapter.layout, adapter.alpha, flat)


def _single(factor: float) -> np.float32:
    if not abs(factor) <= float(np.finfo(np.float32).max):
        raise ValueError(f"a product can only be multiplied by a finite float32 number, got {factor}")
    return np.float32(factor)


def baked(adapter: Adapter) -> Adapter:
    """The same product with alpha = rank, so that every reader, whatever it thinks of alpha, uses scale 1."""
    if adapter.alpha == adapter.rank:
        return adapter
    rescaled = scaled(adapter, adapter.scale)
    return Adapter(adapter.layout, float(adapter.rank), rescaled.flat)


def stack(terms: Sequence[tuple[float, Adapter]]) -> Adapter:
    """The exact weighted sum of products, sum_k w_k dW_k, as one adapter of rank sum_k r_k with scale 1.

    `[w_1 s_1 B_1 ... w_K s_K B_K] @ [A_1; ...; A_K]`; all adapters must adapt the same modules. Beyond the full rank of
    the largest module factors would only take room: then every product is summed up in float64 and is one factor
    itself, the identity the other.
    """
    if not terms:
        raise ShapeError("there is nothing to stack: at least one adapter is needed")
    modules = terms[0][1].layout.modules
    for _, adapter in terms:
        if adapter.layout.modules != modules:
            raise ShapeError("adapters with different modules cannot be stacked; they need one base and target_modules")
    scales = [_single(weight * adapter.scale) for weight, adapter in terms]
    total = sum(adapter.rank for _, adapter in terms)
    layout = Layout(modules, exact_rank([adapter for _, adapter in terms]))
    flat = np.empty(layout.size, np.float32)
    for module, a, b in layout.factors(flat):
        if layout.rank < total:
            factors = [adapter.module(module.name) for _, adapter in terms]
            wide = [scale * b_k.astype(np.float64) for scale, (_, b_k) in zip(scales, factors, strict=True)]
            fill_with_product(a, b, np.vstack([a_k for a_k, _ in factors]).astype(np.float64), np.hstack(wide))
            continue
        row = 0
        for scale, (_, adapter) in zip(scales, terms, strict=True):
            a_k, b_k = adapter.module(module.name)
            rows = slice(row, row + adapter.rank)
            a[rows] = a_k
            np.multiply(b_k, scale, out=b[:, rows])
            row += adapter.rank
    return Adapter(layout, float(layout.rank), flat)


def exact_rank(adapters: Sequence[Adapter]) -> int:
    """A rank at which a sum of their products is exact: the sum of ranks, or what the largest module can have at most.

    It is never below the rank of one of them.
    """
    full = max(min(module.in_features, module.out_features) for module in adapters[0].layout.modules)
    ranks = [adapter.rank for adapter in adapters]
    return min(sum(ranks), max(full, *ranks))


def fill_with_product(a: FloatMatrix, b: FloatMatrix, wide_a: Float64Array, wide_b: Float64Array) -> None:
    """Write factors of wide_b @ wide_a into `a` (r, n) and `b` (m, r), r >= min(m, n): the product and the identity."""
    product = wide_b @ wide_a
    a[...], b[...] = 0.0, 0.0
    outputs, inputs = product.shape
    if outputs <= inputs:
        a[:outputs], b[:, :outputs] = product, np.eye(outputs)
    else:
        a[:inputs], b[:, :inputs] = np.eye(inputs), product


@dataclass(frozen=True, slots=True)
class TruncatedAdapter:
    """An adapter cut to a smaller rank, and what the cut lost.

    `truncation_error` is the relative Frobenius error of the whole product, sqrt(lost energy / energy).
    """

    adapter: Adapter
    truncation_error: float


def recompress(adapter: Adapter, rank: int | None = None, energy: float | None = None) -> TruncatedAdapter:
    """The nearest adapter of a smaller rank in the Frobenius norm (Eckart-Young), module by module.

    Give `rank`, or `energy` in (0, 1]: the smallest rank that keeps this share of squared singular values in every
    module. Rows of A come out orthonormal, B carries the singular values, the scale is 1.
    """
    if (rank is None) == (energy is None):
        raise ValueError("give either rank or energy")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"energy is the share to keep, above 0 and at most 1, got {energy}")
    cores = [_core(a, b, adapter.scale) for _, a, b in adapter.factors()]
    chosen = rank if energy is None else max(rank_for(core.energies, energy) for core in cores)
    assert chosen is not None
    layout = adapter.layout.with_rank(min(chosen, adapter.rank))
    flat = np.zeros(layout.size, np.float32)
    factors = zip(adapter.factors(), layout.factors(flat), cores, strict=True)
    for (_, a, b), (_, new_a, new_b), core in factors:
        directions = min(layout.rank, len(core.into_a))
        new_a[:directions] = core.into_a[:directions] @ a.astype(np.float64)
        new_b[:, :directions] = b.astype(np.float64) @ core.into_b[:, :directions]
    total = sum(float(core.energies.sum()) for core in cores)
    lost = sum(float(core.energies[layout.rank :].sum()) for core in cores)
    return TruncatedAdapter(
        Adapter(layout, float(layout.rank), flat), float(np.sqrt(lost / total)) if total > 0 else 0.0
    )


@dataclass(frozen=True, slots=True)
class _Core:
    """The singular value decomposition of one product, held in its R x R core.

    With G_B = B'B = H H', the product is Q (H'A) for an orthonormal Q, so H' G_A H = Y S^2 Y' gives the singular
    values, and A' = Z'A, B' = B G_A Z with Z = H Y / S are the right factor (orthonormal) and the left one (times S).
    `energies` are S^2 before the scale, falling; `into_a` is Z' and `into_b` is G_A Z times the scale, for the
    directions above rounding noise.
    """

    energies: Float64Array
    into_a: Float64Array
    into_b: Float64Array


def rank_for(energies: Float64Array, energy: float) -> int:
    """The smallest rank that keeps this share of all energies, which fall; 1 where there is none."""
    total = float(energies.sum())
    if total == 0:
        return 1
    shares = np.cumsum(energies) / total
    return min(int(np.searchsorted(shares, energy - 1e-12)) + 1, len(energies))


def _core(a: FloatMatrix, b: FloatMatrix, scale: float) -> _Core:
    gram_a, gram_b = _gram(a.T), _gram(b)
    # A row of A may be huge where the column of B is tiny; levelling the two keeps such a direction above the rounding.
    levels = _levels(np.diagonal(gram_a), np.diagonal(gram_b))
    gram_a, gram_b = gram_a * np.outer(levels, levels), gram_b / np.outer(levels, levels)
    h = _square_root(gram_b)
    energies, y = np.linalg.eigh(h.T @ gram_a @ h)
    energies, y = np.clip(energies[::-1], 0.0, None), y[:, ::-1]
    real = energies > _RELATIVE_FLOOR * energies[0]
    z = (h @ y[:, real]) / np.sqrt(energies[real])
    return _Core(energies, (levels[:, None] * z).T, (scale / levels)[:, None] * (gram_a @ z))


def _gram(tall: FloatMatrix) -> Float64Array:
    wide = tall.astype(np.float64)
    return wide.T @ wide


def _levels(squares_a: Float64Array, squares_b: Float64Array) -> Float64Array:
    """Per rank direction the power of two that brings the norms of A's row and B's column together."""
    used = (squares_a > 0) & (squares_b > 0)
    ratios = np.divide(squares_b, squares_a, out=np.ones_like(squares_a), where=used)
    levels: Float64Array = np.exp2(np.rint(np.log2(ratios) / 4))
    return levels


def _square_root(gram: Float64Array) -> Float64Array:
    """H with H H' = gram: Cholesky where the directions are independent, the eigenvectors where they are not."""
    try:
        return np.asarray(np.linalg.cholesky(gram), np.float64)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(gram)
        root: Float64Array = vectors * np.sqrt(np.clip(values, 0.0, None))
        return root


def product_norm(adapter: Adapter) -> float:
    """Frobenius norm of all products together, sqrt(sum over modules of ||s B A||_F^2)."""
    energy = sum(float((_gram(b) * _gram(a.T)).sum()) for _, a, b in adapter.factors())
    return adapter.scale * math.sqrt(max(energy, 0.0))
