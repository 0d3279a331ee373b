"""A gateway that lives: what experts learned since they left it is folded into it, whoever is ready, without a barrier.

Expert e left a gateway with product W_s and now has W_e. Its delta D_e = W_e - W_s is folded as

    W <- W + sum_e w_e c D_e (g_e G_e + 0.6 rho I) M^-1,    M = sum_j g_j G_j + rho I

with M over *all* experts, ready or not (`fedmoe.lora.regmean` has where this comes from). It is linear in the deltas, so
folds one by one come to what one fold of all comes to. g_j = (mean of x^2 over expert j's inputs)^(-1/2) does not depend
on who is ready. The sum is cut back to the gateway's rank in the metric of M, and of all factors with that product those
are taken that are nearest to where the experts took theirs, so that an optimizer's state still fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmoe.lora.adapter import Adapter, FloatMatrix, ShapeError
from fedmoe.lora.moments import Gram, InputMoments, sum_of_grams
from fedmoe.lora.regmean import _PRIOR, RIDGE, _cut, _Solution, _wide

Matrix64 = NDArray[np.float64]

#: What the folded deltas are multiplied with where several experts share the gateway.
SCALE = 1.2
# Below this share of the largest singular value a direction of the old factors does not steer the new ones.
_STEERS = 1e-2


@dataclass(frozen=True, slots=True)
class Departed:
    """An expert that left the gateway at `start` and is at `now`; `weight` is what its delta counts, 1 when fresh."""

    start: Adapter
    now: Adapter
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Folded:
    """The next gateway, of the rank and alpha of the last; `truncation_error` is relative, of outputs, by the cut."""

    adapter: Adapter
    truncation_error: float


def fold(
    gateway: Adapter,
    ready: Mapping[str, Departed],
    moments: Mapping[str, InputMoments],
    *,
    scale: float | None = None,
    ridge: float = RIDGE,
) -> Folded:
    """The gateway with what the `ready` experts learned since they left it; their names' order does not matter.

    `moments` are those of every expert that shares the gateway, ready or not: they say whose delta counts for which
    inputs. `scale` multiplies the deltas (1.2 where several share, 1 for one alone, if not given). An expert that has
    not moved changes nothing. Raises `ValueError` for numbers out of range or experts without moments, `ShapeError` for
    adapters of another layout than the gateway's or moments of other modules.
    """
    _check(gateway, ready, moments, scale, ridge)
    plan = _Plan(gateway, ready, moments, scale if scale is not None else SCALE if len(moments) > 1 else 1.0, ridge)
    flat = gateway.flat.copy()
    views = {module.name: (a, b) for module, a, b in gateway.layout.factors(flat)}
    kept = lost = 0.0
    for name, grams in _modules(plan):
        part = _fold_module(plan, name, grams)
        if part is None:
            continue
        a, b = views[name]
        a[...], b[...] = part.a, part.b / gateway.scale
        kept, lost = kept + part.kept, lost + part.lost
    error = float(np.sqrt(lost / (kept + lost))) if lost > 0 else 0.0
    return Folded(Adapter(gateway.layout, gateway.alpha, flat), error)


@dataclass(frozen=True)
class _Plan:
    gateway: Adapter
    ready: Mapping[str, Departed]
    moments: Mapping[str, InputMoments]
    scale: float
    ridge: float

    @property
    def prior(self) -> float:
        return _PRIOR if len(self.moments) > 1 else 1.0


@dataclass(frozen=True, slots=True)
class _Part:
    """One module of the next gateway: product b @ a, and the energies of outputs that were kept and lost."""

    a: Matrix64
    b: Matrix64
    kept: float
    lost: float


def _check(
    gateway: Adapter,
    ready: Mapping[str, Departed],
    moments: Mapping[str, InputMoments],
    scale: float | None,
    ridge: float,
) -> None:
    if not ready:
        raise ValueError("no expert is ready; a fold needs at least one")
    if not ridge > 0 or not (scale is None or 0 < scale < np.inf):
        raise ValueError(f"ridge and scale must be positive numbers, got {ridge} and {scale}")
    missing = sorted(ready.keys() - moments.keys())
    if missing:
        raise ValueError(f"a fold needs the input moments of every expert and has none of {missing}")
    for name, expert in ready.items():
        if not 0 <= expert.weight < np.inf:
            raise ValueError(f"the weight of {name} must be a number of at least 0, got {expert.weight}")
        for adapter in (expert.start, expert.now):
            if adapter.layout != gateway.layout:
                raise ShapeError(
                    f"{name} has rank {adapter.rank} and {len(adapter.layout.modules)} modules, not the gateway's rank "
                    f"{gateway.rank} and modules; experts go on from the gateway at its own rank"
                )
    for name, found in moments.items():
        for module in gateway.layout.modules:
            known = found.modules.get(module.name)
            if known is None or known.features != module.in_features:
                got = "none" if known is None else f"{known.features} features"
                raise ShapeError(
                    f"moments of {name}: module {module.name} has {module.in_features} inputs, got {got}; "
                    "collect them on the base model and target_modules of the gateway"
                )


def _modules(plan: _Plan) -> Iterator[tuple[str, Mapping[str, Gram]]]:
    """Every module with the experts' G; those with one input come after each other, so that G is rebuilt once."""
    names = {module.name for module in plan.gateway.layout.modules}
    experts = sorted(plan.moments)
    rebuilt: list[tuple[tuple[str, ...], Gram]] = []
    for group in plan.moments[experts[0]].groups:
        for name in (name for name in group if name in names):
            if not rebuilt or any(name not in shared for shared, _ in rebuilt):
                found = [plan.moments[expert] for expert in experts]
                rebuilt = [(moments.group_of(name), moments.approximate(name)) for moments in found]
            yield name, dict(zip(experts, (gram for _, gram in rebuilt), strict=True))


def _fold_module(plan: _Plan, name: str, grams: Mapping[str, Gram]) -> _Part | None:
    """The module's next factors; None where no expert has moved."""
    moved = {
        expert: (_wide(departed.start, name), _wide(departed.now, name), departed.weight)
        for expert, departed in sorted(plan.ready.items())
        if departed.weight > 0 and not _same(departed.start, departed.now, name)
    }
    if not moved:
        return None
    shares = {expert: _share(gram) for expert, gram in grams.items()}
    metric = sum_of_grams([(shares[expert], gram) for expert, gram in grams.items()])
    rho = plan.ridge * float(metric.full_diagonal.mean()) or 1.0
    metric = metric.plus(rho)
    a_gateway, b_gateway = _wide(plan.gateway, name)
    images, columns = [], [b_gateway]
    for expert, ((a_start, b_start), (a, b), weight) in moved.items():
        # B A - B_s A_s = (B - B_s) A + B_s (A - A_s): both terms are as small as what was learned.
        rows = np.vstack([a, a - a_start])
        images.append(plan.scale * (shares[expert] * grams[expert].rows(rows) + plan.prior * rho * rows))
        columns += [weight * (b - b_start), weight * b_start]
    learned = metric.solve(np.vstack(images))
    target = a_gateway + sum(
        weight * learned[(2 * place + 1) * len(a_gateway) : (2 * place + 2) * len(a_gateway)]
        for place, (_, _, weight) in enumerate(moved.values())
    )
    whole = _Solution(np.vstack([a_gateway, learned]), np.hstack(columns), np.vstack([metric.rows(a_gateway), *images]))
    cut = _cut(whole, plan.gateway.rank)
    a_new, b_new = nearest_factors(cut.a, cut.b, target)
    rank = plan.gateway.rank
    return _Part(a_new, b_new, float(cut.energies[:rank].sum()), float(cut.energies[rank:].sum()))


def _same(left: Adapter, right: Adapter, name: str) -> bool:
    pairs = zip(left.module(name), right.module(name), strict=True)
    return left.alpha == right.alpha and all(np.array_equal(one, other) for one, other in pairs)


def _share(gram: Gram) -> float:
    mean = float(gram.full_diagonal.mean())
    return mean**-0.5 if mean > 0 else 0.0


def nearest_factors(a: FloatMatrix, b: FloatMatrix, target: Matrix64) -> tuple[Matrix64, Matrix64]:
    """Factors of the product b @ a, as many rows of A as `target` (r x n) has, with A the least squares next to it.

    a is k x n and b out x k with k <= r. Directions that the product lacks are filled up from `target`, with B = 0, so
    that they can be learned in. Where `target` says too little of a direction, A is the nearest with orthogonal rows of
    the length of target's (Procrustes).
    """
    rank = len(target)
    basis, mix = np.linalg.qr(a.T.astype(np.float64))
    product = b.astype(np.float64) @ mix.T
    rest = target - (target @ basis) @ basis.T
    missing = min(rank, target.shape[1]) - basis.shape[1]
    if missing > 0:
        basis = np.hstack([basis, np.linalg.svd(rest, full_matrices=False)[2][:missing].T])
        product = np.hstack([product, np.zeros((len(product), missing))])
    steer = target @ basis
    left, sizes, right = np.linalg.svd(steer, full_matrices=False)
    if sizes[-1] <= _STEERS * sizes[0]:
        sizes = np.full_like(sizes, float(np.sqrt(np.square(target).sum() / rank)) or 1.0)
    turned = (left * sizes) @ right
    return turned @ basis.T, product @ (right.T / sizes) @ left.T
