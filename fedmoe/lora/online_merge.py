"""Online merge: merges the deltas of the experts that are ready into the gateway, without a barrier.

Expert e branched from a gateway with product W_s and now has W_e. Its delta D_e = W_e - W_s is merged as

    W <- W + c sum_e w_e D_e (g_e G_e + 0.6 rho I) M^-1,    M = sum_j g_j G_j + rho I

with M over *all* experts, ready or not (`fedmoe.lora.regmean` has where this comes from). It is linear in the deltas,
so merges one by one come to what one merge of all comes to. g_j = (mean of x^2 over expert j's inputs)^(-1/2) does not
depend on who is ready. The sum is cut back to the gateway's rank in the metric of M, and of all factors with that
product those are taken that are nearest to where the experts took theirs, so that an optimizer's state still fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedmoe.lora import regmean
from fedmoe.lora.adapter import Adapter, Float64Array, FloatMatrix, ShapeError
from fedmoe.lora.algebra import TruncatedAdapter, recompress, stack
from fedmoe.lora.kept_terms import same_module
from fedmoe.lora.moments import Gram, InputMoments, sum_of_grams

# The least length of a direction of A, as a share of the largest: below, B would have to be too large for float32.
_LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class ExpertDelta:
    """An expert that branched from the gateway at `start` and is at `now`; `weight` is its delta's, 1 when fresh."""

    start: Adapter
    now: Adapter
    weight: float = 1.0


def merge_into_gateway(
    gateway: Adapter, ready: Mapping[str, ExpertDelta], moments: Mapping[str, InputMoments], *, scale: float = 1.0
) -> TruncatedAdapter:
    """The gateway with what the `ready` experts learned since they branched; their names' order does not matter.

    `moments` are those of every expert that shares the gateway, ready or not: they say whose delta counts for which
    inputs. `scale` is c; 1 and 1.2 were measured alike, 1.5 is too much. An expert that has not moved changes nothing.
    Raises `ValueError` for numbers out of range or experts without moments, `ShapeError` for adapters of another layout
    than the gateway's or moments of other modules.
    """
    _check(gateway, ready, moments, scale)
    prior = regmean.PRIOR if len(moments) > 1 else 1.0
    flat = gateway.flat.copy()
    views = {module.name: (a, b) for module, a, b in gateway.layout.factors(flat)}
    energy = lost = 0.0
    experts = sorted(moments)
    for group in regmean.groups_by_input([moments[expert] for expert in experts], gateway.layout.modules):
        grams = group.all()
        for name in group.names:
            moved = {
                expert: delta
                for expert, delta in sorted(ready.items())
                if delta.weight > 0 and not same_module(delta.start, delta.now, name)
            }
            if not moved:
                continue
            cut, a_target = _merged_module(gateway, name, moved, dict(zip(experts, grams, strict=True)), scale, prior)
            a_new, b_new = nearest_factors(cut.a, cut.b, a_target)
            a, b = views[name]
            a[...], b[...] = a_new, b_new / gateway.scale
            energy += float(cut.energies[: gateway.rank].sum())
            lost += float(cut.energies[gateway.rank :].sum())
    error = float(np.sqrt(lost / (energy + lost))) if lost > 0 else 0.0
    return TruncatedAdapter(Adapter(gateway.layout, gateway.alpha, flat), error)


def _check(
    gateway: Adapter, ready: Mapping[str, ExpertDelta], moments: Mapping[str, InputMoments], scale: float
) -> None:
    if not ready:
        raise ValueError("no expert is ready; a merge needs at least one")
    if not 0 < scale < np.inf:
        raise ValueError(f"the scale must be a positive number, got {scale}")
    missing = sorted(ready.keys() - moments.keys())
    if missing:
        raise ValueError(f"a merge needs the input moments of every expert and has none of {missing}")
    for name, expert in ready.items():
        if not 0 <= expert.weight < np.inf:
            raise ValueError(f"the weight of {name} must be a number of at least 0, got {expert.weight}")
        for adapter in (expert.start, expert.now):
            if adapter.layout != gateway.layout:
                raise ShapeError(
                    f"{name} has rank {adapter.rank} and {len(adapter.layout.modules)} modules, not the gateway's rank "
                    f"{gateway.rank} and modules; experts are rebased onto the gateway at its own rank"
                )
    regmean.check_moments(moments, gateway.layout.modules)


def _merged_module(
    gateway: Adapter, name: str, moved: Mapping[str, ExpertDelta], grams: Mapping[str, Gram], scale: float, prior: float
) -> tuple[regmean.MetricCut, Float64Array]:
    """The module's next product, cut in the metric of M, and the gateway's A with what each expert's own A learned."""
    a_gateway, b_gateway = regmean.wide_factors(gateway, name)
    shares = {expert: regmean.input_weight(gram) for expert, gram in grams.items()}
    metric = sum_of_grams([(shares[expert], gram) for expert, gram in grams.items()])
    rho = regmean.RIDGE * float(metric.full_diagonal.mean()) or 1.0
    metric = metric.plus(rho)
    images, columns = [metric.rows(a_gateway)], [b_gateway]
    for expert, delta in moved.items():
        (a_start, b_start), (a, b) = regmean.wide_factors(delta.start, name), regmean.wide_factors(delta.now, name)
        rows = np.vstack([a, a_start])
        images.append(scale * (shares[expert] * grams[expert].rows(rows) + prior * rho * rows))
        columns += [delta.weight * b, -delta.weight * b_start]
    learned = metric.solve(np.vstack(images[1:]))
    whole = regmean.Solution(np.vstack([a_gateway, learned]), np.hstack(columns), np.vstack(images))
    # `learned` has all that is merged of A and of A's start.
    after, before = learned.reshape(len(moved), 2, *a_gateway.shape).swapaxes(0, 1)
    weights = np.asarray([delta.weight for delta in moved.values()])
    return regmean.cut_in_metric(whole, gateway.rank), a_gateway + np.tensordot(weights, after - before, 1)


def nearest_factors(a: FloatMatrix, b: FloatMatrix, target: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Factors of the product b @ a with A as near to `target` (r x n) as can be while A A' = target target'.

    a is k x n and b out x k with k <= r. With T = S X, S = (T T')^(1/2), and rows Q that span those of a, A = S U Q for
    the orthogonal U next to X Q' (Procrustes). Least squares, which would let A A' go, makes rows of A short that
    turned away from the target, and B large: training on from such factors diverged. Directions that the product lacks
    are filled up from the target, with B = 0, so that they can be learned in.
    """
    rank = len(target)
    basis, mix = np.linalg.qr(a.T.astype(np.float64))
    product = b.astype(np.float64) @ mix.T
    missing = min(rank, target.shape[1]) - basis.shape[1]
    if missing > 0:
        rest = target - (target @ basis) @ basis.T
        basis = np.hstack([basis, np.linalg.svd(rest, full_matrices=False)[2][:missing].T])
        product = np.hstack([product, np.zeros((len(product), missing))])
    left, sizes, right = np.linalg.svd(target, full_matrices=False)
    sizes = np.maximum(sizes, _LEAST * sizes[0]) if sizes[0] > 0 else np.ones_like(sizes)
    outer, _, inner = np.linalg.svd(right @ basis)
    turn = outer @ inner  # the orthogonal matrix next to it
    return (left * sizes) @ turn @ basis.T, product @ (turn.T / sizes) @ left.T


#: What the deltas are multiplied with where several experts share the gateway; measured beside 1.2 with moments.
SUM_SCALE = 0.7


def add_into_gateway(gateway: Adapter, ready: Mapping[str, ExpertDelta], several: bool) -> TruncatedAdapter:
    """The gateway with the deltas of the `ready` experts; `several` says that it is shared, by these or others.

    Rank, alpha and layout stay. Raises `ShapeError` for adapters of other modules.
    """
    scale = SUM_SCALE if several else 1.0
    named = ((name, ready[name]) for name in sorted(ready))
    moved = {
        name: delta for name, delta in named if delta.weight and not np.array_equal(delta.now.flat, delta.start.flat)
    }
    if not moved:
        return TruncatedAdapter(gateway, 0.0)
    terms = [(1.0, gateway)]
    for delta in moved.values():
        share = scale * delta.weight
        terms += [(share, delta.now), (-share, delta.start)]
    cut = recompress(stack(terms), gateway.rank)
    flat = np.empty_like(gateway.flat)
    for module, a, b in gateway.layout.factors(flat):
        a_cut, b_cut = cut.adapter.module(module.name)
        b_cut = b_cut * np.float32(cut.adapter.scale / gateway.scale)
        a[...], b[...] = nearest_factors(a_cut, b_cut, _where_experts_are(gateway, moved, module.name, scale))
    return TruncatedAdapter(Adapter(gateway.layout, gateway.alpha, flat), cut.truncation_error)


def _where_experts_are(gateway: Adapter, moved: Mapping[str, ExpertDelta], module: str, scale: float) -> Float64Array:
    """The rows of A that the next factors should be near: the gateway's, moved as the experts moved theirs."""
    target = gateway.module(module)[0].astype(np.float64)
    for delta in moved.values():
        step = delta.now.module(module)[0].astype(np.float64) - delta.start.module(module)[0]
        target += scale * delta.weight * step
    return target
