"""RegMean for LoRA: the merge that changes least what each expert does with the inputs of its own domain.

With W_i = s_i B_i A_i, second moments G_i (n x n) of expert i's inputs and g_i = (tr G_i / n)^(-1/2), it solves

    min_W  sum_i g_i tr((W - W_i) G_i (W - W_i)') + rho |W - 0.6 sum_i W_i|^2

The answer W = sum_i W_i (g_i G_i + 0.6 rho I) M^-1, M = sum_j g_j G_j + rho I, keeps every B_i and changes only A: rank
sum_i r_i, no product of B and A. Any other W costs |(W - answer) M^(1/2)|^2 more, so the best W of a smaller rank is
the answer cut in the metric of M, and nothing is gained by alternating between the factors. RegMean: Jin et al. 2023.
A G of few tokens is padded first (`fedmoe.lora.moments.pad_thin_grams`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.lora.adapter import Adapter, Float64Array, FloatMatrix, ModuleShape, ShapeError
from fedmoe.lora.algebra import TruncatedAdapter, exact_rank, fill_with_product, rank_for
from fedmoe.lora.kept_terms import ExpertTerms, GroupTerms, KeptTerms, Metric, Setting, same_module
from fedmoe.lora.moments import LEAST_TOKENS, Gram, InputMoments, Inverse, pad_thin_grams, sum_of_grams

Factors64 = tuple[Float64Array, Float64Array]

#: Measured on three domains: a scale above 1 makes up for what experts take from each other; the ridge hardly matters.
SCALE = 1.3
RIDGE = 0.01
#: The highest rank that is chosen by energy.
RANK_CAP = 64
#: How much of the plain sum of several stands where none has inputs.
PRIOR = 0.6
# Shares below which a number is rounding: of the largest eigenvalue of a float64 Gram matrix, and of what an expert's
# factors would put out if none of it cancelled.
_RELATIVE_FLOOR = 1e-14
_SILENT = 1e-12


@dataclass(frozen=True)
class _Plan:
    """Inputs and options of one merge; experts, moments and weights in one order."""

    experts: Sequence[Adapter]
    moments: Sequence[InputMoments]
    weights: Sequence[float]
    scale: float
    kept: KeptTerms

    @property
    def prior(self) -> float:
        """How much of the plain sum stands where no expert has inputs."""
        return PRIOR if len(self.experts) > 1 else 1.0

    @property
    def rank(self) -> int:
        """The sum of ranks, or the full rank of the largest module where that is smaller: there nothing is cut."""
        return exact_rank(self.experts)


@dataclass(frozen=True, slots=True)
class Solution:
    """W = b @ a for one module, b out x R, a R x n; `image` is a @ M."""

    a: Float64Array
    b: Float64Array
    image: Float64Array


@dataclass(frozen=True, slots=True)
class MetricCut:
    """The leading directions of one module's W in the metric of M, and the energies of all R, falling."""

    a: FloatMatrix
    b: FloatMatrix
    energies: Float64Array


def regmean(
    experts: Mapping[str, Adapter],
    moments: Mapping[str, InputMoments],
    scale: float | None = None,
    weights: Mapping[str, float] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    kept: KeptTerms | None = None,
) -> TruncatedAdapter:
    """The experts merged in the metric of their own inputs; one expert alone comes back as it is.

    `scale` multiplies the result (1.3 for several experts if not given), `weights` say how much each expert's inputs
    count. The rank is the sum of ranks (or the full rank of the largest module), or `rank`, or with `energy` the
    smallest that keeps this share in every module, at most `rank` (64 if not given).
    What `kept` has of an earlier merge is not computed again: the bits are the same.
    The truncation error is relative and in the metric of M, that is of outputs. Raises `ValueError` for experts without
    moments and `ShapeError` for adapters or moments of other modules.
    """
    _check(experts, moments)
    if (energy is not None and not 0 < energy <= 1) or (rank is not None and rank < 1):
        raise ValueError(f"rank >= 1 and energy in (0, 1] are needed, got {rank} and {energy}")
    names = sorted(experts)
    plan = _Plan(
        [experts[name] for name in names],
        [moments[name] for name in names],
        [1.0 if weights is None else weights[name] for name in names],
        scale if scale is not None else SCALE if len(names) > 1 else 1.0,
        kept if kept is not None else KeptTerms(0),
    )
    limit = min(plan.rank, rank or (plan.rank if energy is None else RANK_CAP))
    if energy is None and limit == plan.rank:
        return TruncatedAdapter(_uncut(plan), 0.0)
    return _cut_to(plan, limit, energy)


def _check(experts: Mapping[str, Adapter], moments: Mapping[str, InputMoments]) -> None:
    if not experts:
        raise ValueError("there is no expert to merge yet; a worker has to register one first")
    missing = sorted(experts.keys() - moments.keys())
    if missing:
        raise ValueError(
            f"regmean needs the input moments of every expert and has none of {missing}; "
            "collect them on the experts' own training text, or merge with another strategy"
        )
    modules = next(iter(experts.values())).layout.modules
    if any(adapter.layout.modules != modules for adapter in experts.values()):
        raise ShapeError("adapters with different modules cannot be merged; they need one base and target_modules")
    check_moments({name: moments[name] for name in experts}, modules)


def check_moments(moments: Mapping[str, InputMoments], modules: Sequence[ModuleShape]) -> None:
    """Raises `ShapeError` for moments that lack a module or have another number of inputs for it."""
    for expert, of_expert in moments.items():
        for module in modules:
            of_module = of_expert.modules.get(module.name)
            if of_module is None or of_module.features != module.in_features:
                got = "none" if of_module is None else f"{of_module.features} features"
                raise ShapeError(
                    f"moments of {expert}: module {module.name} has {module.in_features} inputs, got {got}; "
                    "collect them on the base model and target_modules of the experts"
                )


class GroupGrams:
    """Modules with one input, and the G of each expert's inputs there: rebuilt once asked for, thin ones padded."""

    def __init__(self, names: Sequence[str], moments: Sequence[InputMoments]) -> None:
        self.names, self._moments = names, moments
        self._grams: dict[int, Gram] = {}
        self._thin = len(moments) > 1 and min(of_expert.tokens for of_expert in moments) < LEAST_TOKENS

    def __getitem__(self, place: int) -> Gram:
        if place not in self._grams:
            if self._thin:
                # Thin ones are padded with all experts' inputs.
                grams = [of_expert.approximate(self.names[0]) for of_expert in self._moments]
                tokens = [of_expert.tokens for of_expert in self._moments]
                self._grams = dict(enumerate(pad_thin_grams(grams, tokens)))
            else:
                self._grams[place] = self._moments[place].approximate(self.names[0])
        return self._grams[place]

    def all(self) -> list[Gram]:
        """One for each expert."""
        return [self[place] for place in range(len(self._moments))]


def groups_by_input(moments: Sequence[InputMoments], modules: Sequence[ModuleShape]) -> Iterator[GroupGrams]:
    """The modules in groups that have one input at every expert."""
    names = {module.name for module in modules}
    groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for name in (name for group in moments[0].groups for name in group if name in names):
        groups.setdefault(tuple(of_expert.group_of[name] for of_expert in moments), []).append(name)
    for alike in groups.values():
        yield GroupGrams(alike, moments)


def input_weight(gram: Gram) -> float:
    """g, the weight that makes inputs of any size count alike: their inverse root mean square; 0 without inputs."""
    return _weight_of(float(gram.full_diagonal.mean()))


def _weight_of(size: float) -> float:
    return size**-0.5 if size > 0 else 0.0


def _solutions(plan: _Plan) -> Iterator[tuple[str, Solution]]:
    for grams in groups_by_input(plan.moments, plan.experts[0].layout.modules):
        before = plan.kept.of(grams.names, plan.moments)
        after = GroupTerms(before.moments, before.sizes or [float(gram.full_diagonal.mean()) for gram in grams.all()])
        alike: dict[tuple[bool, ...], list[str]] = {}
        for name in grams.names:
            alike.setdefault(_moved(plan, name, grams, before, after), []).append(name)
        for moved, names in alike.items():
            yield from _solve(plan, (tuple(names), moved, tuple(plan.weights), plan.scale), grams, before, after)
        plan.kept.keep(grams.names, after)


def _moved(plan: _Plan, name: str, grams: GroupGrams, before: GroupTerms, after: GroupTerms) -> tuple[bool, ...]:
    """Which experts do anything in a module."""
    for place, adapter in enumerate(plan.experts):
        earlier = before.moved.get((name, place))
        if earlier is not None and same_module(earlier[0], adapter, name):
            after.moved[name, place] = adapter, earlier[1]
        else:
            after.moved[name, place] = adapter, _does(*wide_factors(adapter, name), grams[place])
    return tuple(after.moved[name, place][1] for place in range(len(plan.experts)))


def _metric(setting: Setting, grams: GroupGrams, sizes: Sequence[float]) -> Metric:
    _, moved, weights, _ = setting
    shares = tuple(
        weight * _weight_of(size) if does else 0.0 for weight, size, does in zip(weights, sizes, moved, strict=True)
    )
    metric = sum_of_grams(list(zip(shares, grams.all(), strict=True)))
    # Where no expert does anything, M may be any multiple of the identity.
    rho = RIDGE * float(metric.full_diagonal.mean()) or 1.0
    return Metric(shares, rho, Inverse.of(metric.plus(rho)))


def _solve(
    plan: _Plan, setting: Setting, grams: GroupGrams, before: GroupTerms, after: GroupTerms
) -> Iterator[tuple[str, Solution]]:
    """Modules with one input and one M; each expert's rows by themselves, so that they never depend on another's."""
    names = setting[0]
    metric = before.metrics.get(setting) or _metric(setting, grams, after.sizes)
    after.metrics[setting] = metric
    terms = []
    for place, adapter in enumerate(plan.experts):
        known = before.terms.get((setting, place))
        if known is None or not all(same_module(known.adapter, adapter, name) for name in names):
            known = _terms(plan, names, place, grams[place], metric)
        after.terms[setting, place] = known
        terms.append(known)
    for name in names:
        b = np.hstack([wide_factors(adapter, name)[1] for adapter in plan.experts])
        a, image = (
            np.vstack([rows[name] for rows in parts])
            for parts in zip(*((t.solved, t.images) for t in terms), strict=True)
        )
        yield name, Solution(a, b, image)


def _terms(plan: _Plan, names: Sequence[str], place: int, gram: Gram, metric: Metric) -> ExpertTerms:
    adapter = plan.experts[place]
    rows = np.vstack([adapter.module(name)[0] for name in names]).astype(np.float64)
    image = plan.scale * (metric.shares[place] * gram.rows(rows) + plan.prior * metric.rho * rows)
    images, solved = (np.split(found, len(names)) for found in (image, metric.inverse.rows(image)))
    return ExpertTerms(adapter, dict(zip(names, images, strict=True)), dict(zip(names, solved, strict=True)))


def wide_factors(adapter: Adapter, name: str) -> Factors64:
    """A and scale * B of one module in float64."""
    a, b = adapter.module(name)
    return a.astype(np.float64), adapter.scale * b.astype(np.float64)


def _does(a: Float64Array, b: Float64Array, gram: Gram) -> bool:
    """Whether outputs B A x exceed rounding."""
    energy = float(((b.T @ b) * gram.between(a)).sum())
    # Before anything cancels: the factors of an expert that does nothing may cancel to rounding only.
    bulk = float((np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=0)).sum())
    return energy > _SILENT * bulk**2 * float(gram.full_diagonal.mean())


def _uncut(plan: _Plan) -> Adapter:
    layout = plan.experts[0].layout.with_rank(plan.rank)
    flat = np.empty(layout.size, np.float32)
    result = Adapter(layout, float(layout.rank), flat)
    views = {module.name: (a, b) for module, a, b in layout.factors(flat)}
    for name, solution in _solutions(plan):
        a, b = views[name]
        if len(solution.a) > len(a):
            fill_with_product(a, b, solution.a, solution.b)
        else:
            a[...], b[...] = solution.a, solution.b
    return result


def _cut_to(plan: _Plan, limit: int, energy: float | None) -> TruncatedAdapter:
    cuts = {name: cut_in_metric(solution, limit) for name, solution in _solutions(plan)}
    rank = limit if energy is None else min(limit, max(rank_for(cut.energies, energy) for cut in cuts.values()))
    total = sum(float(cuts[name].energies.sum()) for name in sorted(cuts))
    lost = sum(float(cuts[name].energies[rank:].sum()) for name in sorted(cuts))
    layout = plan.experts[0].layout.with_rank(rank)
    flat = np.zeros(layout.size, np.float32)
    for module, a, b in layout.factors(flat):
        cut = cuts.pop(module.name)  # let go of, so that both never lie in memory whole
        directions = min(rank, len(cut.a))
        basis, mix = np.linalg.qr(cut.a[:directions].T.astype(np.float64))
        width = basis.shape[1]
        a[:width], b[:, :width] = basis.T, cut.b[:, :directions] @ mix.T
    return TruncatedAdapter(Adapter(layout, float(rank), flat), float(np.sqrt(lost / total)) if total > 0 else 0.0)


def cut_in_metric(solution: Solution, limit: int) -> MetricCut:
    """W's leading singular directions in the metric of M, as `algebra._core` finds them in the plain one."""
    gram_a, gram_b = solution.image @ solution.a.T, solution.b.T @ solution.b
    sizes = np.sqrt(np.clip(np.diagonal(gram_a), 0.0, None))
    sizes[sizes == 0] = 1.0
    gram_a, gram_b = (gram_a + gram_a.T) / 2 / np.outer(sizes, sizes), gram_b * np.outer(sizes, sizes)
    values, vectors = np.linalg.eigh(gram_b)
    root = vectors * np.sqrt(np.clip(values, 0.0, None))
    energies, turned = np.linalg.eigh(root.T @ gram_a @ root)
    energies, turned = np.clip(energies[::-1], 0.0, None), turned[:, ::-1]
    real = energies[:limit] > _RELATIVE_FLOOR * energies[0]
    z = (root @ turned[:, :limit][:, real]) / np.sqrt(energies[:limit][real])
    a = (z / sizes[:, None]).T @ solution.a
    b = solution.b @ (sizes[:, None] * (gram_a @ z))
    # Rows of A come out of length 1 in the metric of M, whatever its unit; of length 1 they fit into float32.
    lengths = np.linalg.norm(a, axis=1)
    lengths[lengths == 0] = 1.0
    return MetricCut((a / lengths[:, None]).astype(np.float32), (b * lengths).astype(np.float32), energies)
