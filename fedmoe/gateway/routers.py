"""Prompt routers: the probability of every expert for a prompt, from features of the base model.

A router turns feature vectors, one row a prompt, into a probability for every expert; `fedmoe.gateway.rerank` decides
between the likely ones and the merged adapter. `SequenceRouter` needs a few numbers from each expert's workers,
`SpectralRouter` nothing but the adapters, `LinearRouter` labelled prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedmoe.lora.adapter import Adapter, Float64Array, FloatMatrix, ShapeError
from fedmoe.lora.prompt_statistics import FeatureMoments, PromptStatistics, orthogonal_rows


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


@dataclass(frozen=True, eq=False)
class _LinearScores:
    """log p(expert | x) = x' weights + offsets + a constant: `weights` (d, experts), `offsets` (experts,), float64."""

    names: tuple[str, ...]
    weights: Float64Array
    offsets: Float64Array

    def __post_init__(self) -> None:
        _check(self.names)
        if self.weights.ndim != 2 or {self.weights.shape[1:], self.offsets.shape} != {(len(self.names),)}:
            raise ShapeError(
                f"{len(self.names)} experts need a column of weights and an offset each, "
                f"got {self.weights.shape} and {self.offsets.shape}"
            )

    @property
    def width(self) -> int:
        return int(self.weights.shape[0])

    def probabilities(self, features: FloatMatrix) -> Float64Array:
        return _softmax(_wide(features, self.width) @ self.weights + self.offsets)


class SequenceRouter(_LinearScores):
    """Linear discriminant analysis: a centroid for every expert and one covariance for all."""

    @classmethod
    def fit(cls, statistics: Mapping[str, PromptStatistics], shrinkage: float | None = None) -> SequenceRouter:
        """The router of these experts, in closed form: another expert is another centroid, the others send nothing new.

        The covariance is the pooled one with every feature scaled to variance 1, shrunk towards the identity: (1 -
        shrinkage) R + shrinkage I. None takes the oracle approximating shrinkage (Chen, Wiesel, Eldar and Hero 2010),
        which needs the covariance and the number of samples only; Ledoit and Wolf's needs every single prompt, and
        those stay at the sites. Probabilities are tempered so that a router fitted to one half of the samples is as
        right on the other half as it says. All experts are equally likely beforehand. Raises `ShapeError` for features
        of different width and `ValueError` where no expert has two prompts that differ.
        """
        names = tuple(sorted(statistics))
        _check(names)
        if len({part.width for part in statistics.values()}) != 1:
            got = {name: statistics[name].width for name in names}
            raise ShapeError(f"prompt features must have one width, of one base model; got {got}")
        first = [statistics[name].first for name in names]
        second = [statistics[name].second for name in names]
        temperature = _temperature([(first, second), (second, first)], shrinkage) if len(names) > 1 else 1.0
        weights, offsets = _discriminants([statistics[name].together() for name in names], shrinkage)
        return cls(names, weights / temperature, offsets / temperature)


class LinearRouter(_LinearScores):
    """Softmax regression on labelled prompts, for a gateway that has some of its own."""

    @classmethod
    def fit(cls, features: Mapping[str, FloatMatrix]) -> LinearRouter:
        """The router of these experts from prompt features (prompts, d) of each, every expert counting the same.

        Features are scaled to variance 1; the sum of squared weights costs `_DECAY` / 2. Full-batch gradient descent
        with Nesterov's momentum, its step from the largest curvature, so there is nothing to tune. Raises `ShapeError`
        for features of different width and ValueError for an expert without prompts.
        """
        names = tuple(sorted(features))
        _check(names)
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
        return cls(names, weights, -centre @ weights)


def _discriminants(parts: Sequence[FeatureMoments], shrinkage: float | None) -> tuple[Float64Array, Float64Array]:
    """Weights (d, experts) and offsets (experts,) of the linear discriminants."""
    covariance, scale = _correlation(parts)
    free = max(1, sum(part.count for part in parts) - len(parts))
    amount = _oracle_shrinkage(covariance, free) if shrinkage is None else shrinkage
    if not 0 < amount <= 1:
        raise ValueError(f"shrinkage must be above 0 and at most 1, got {amount}")
    means = np.stack([part.mean for part in parts], axis=1).astype(np.float64)
    # Only differences matter; moved to their middle the discriminants lose no digits to a large common part.
    middle = means.mean(axis=1, keepdims=True)
    weights = covariance.shrunk(amount).solve((means - middle) / scale[:, None]) / scale[:, None]
    return weights, -0.5 * ((means + middle) * weights).sum(axis=0)


@dataclass(frozen=True, eq=False)
class _Covariance:
    """rows' rows + diag(rest), never formed: `rows` (m, d), `rest` (d,)."""

    rows: Float64Array
    rest: Float64Array

    @property
    def variances(self) -> Float64Array:
        return np.asarray(np.square(self.rows).sum(axis=0) + self.rest)

    @property
    def squares(self) -> float:
        """The sum of all squared entries, tr(S^2)."""
        cross = 2 * float(np.square(self.rows).sum(axis=0) @ self.rest)
        return float(np.square(self.rows @ self.rows.T).sum()) + cross + float(self.rest @ self.rest)

    def shrunk(self, shrinkage: float) -> _Covariance:
        """(1 - shrinkage) S + shrinkage I."""
        return _Covariance(np.sqrt(1 - shrinkage) * self.rows, (1 - shrinkage) * self.rest + shrinkage)

    def solve(self, right: Float64Array) -> Float64Array:
        """The inverse times `right` (d, k), by Woodbury: an m x m system instead of a d x d one; needs rest > 0."""
        lean = self.rows / self.rest
        core = np.eye(len(self.rows)) + lean @ self.rows.T
        return np.asarray(right / self.rest[:, None] - lean.T @ np.linalg.solve(core, lean @ right))


def _correlation(parts: Sequence[FeatureMoments]) -> tuple[_Covariance, Float64Array]:
    """The pooled covariance inside the experts with every variance 1, and the standard deviations (d,) it had.

    A feature that hardly moves counts as one that moves a thousandth as much as usual.
    """
    count = sum(part.count for part in parts)
    stacked = [np.sqrt(part.count / count) * part.spread.astype(np.float64) for part in parts]
    rest = sum((part.count / count * part.rest.astype(np.float64) for part in parts), np.zeros(parts[0].width))
    pooled = _Covariance(orthogonal_rows(np.concatenate(stacked)), rest)
    variances = pooled.variances
    if not variances.any():
        raise ValueError("no expert has two prompts that differ; send statistics of more prompts")
    scale = np.sqrt(np.maximum(variances, 1e-6 * variances.mean()))
    return _Covariance(pooled.rows / scale, rest / scale**2), scale


def _oracle_shrinkage(covariance: _Covariance, free: int) -> float:
    """Chen et al. 2010, equation 23, for `free` degrees of freedom; at least 0.001, for stability."""
    width = len(covariance.rest)
    trace, squares = float(covariance.variances.sum()), covariance.squares
    above = (1 - 2 / width) * squares + trace**2
    below = (free + 1 - 2 / width) * (squares - trace**2 / width)
    return 1.0 if below <= 0 else min(1.0, max(1e-3, above / below))


_TEMPERATURES = np.geomspace(1.0, 64.0, 49)
_DRAWS = 256


def _temperature(folds: Sequence[tuple[Sequence[FeatureMoments], ...]], shrinkage: float | None) -> float:
    """What to divide the scores by: the likeliest on halves that the discriminants were not fitted to.

    The scores of an expert's unseen prompts are drawn as normal with the mean and covariance that its other half's
    moments give them (scores are linear in the features). Never below 1: with few draws, certainty would be chance.
    """
    losses = np.zeros(len(_TEMPERATURES))
    draws = np.random.default_rng(0)  # the same statistics make the same router
    for fit, check in folds:
        weights, offsets = _discriminants(fit, shrinkage)
        for label, part in enumerate(check):
            rows = np.concatenate([part.spread @ weights, np.sqrt(part.rest)[:, None] * weights])
            root = orthogonal_rows(rows)
            scores = part.mean @ weights + offsets + draws.standard_normal((_DRAWS, len(root))) @ root
            behind = scores - scores[:, [label]]
            losses += [np.logaddexp.reduce(behind / temperature, axis=1).sum() for temperature in _TEMPERATURES]
    return float(_TEMPERATURES[losses.argmin()])


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
        slope = heavy.T @ (_softmax(x @ ahead) - targets) + _DECAY * ahead
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
        _check(names)
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
        return np.add.reduceat(_wide(rows, self.width), self.starts[:-1], axis=1).astype(np.float32)

    def probabilities(self, features: FloatMatrix) -> Float64Array:
        return _softmax((self._levels(features) - self.centre) / self.spread)

    def _levels(self, features: FloatMatrix) -> Float64Array:
        return np.log(np.maximum(self.energies(features).astype(np.float64), 1e-30))


def _projection(a: FloatMatrix, b: FloatMatrix) -> FloatMatrix:
    """P (r, n) with ||P x|| = ||B A x|| / ||B A||_F; zeros for a product of zero."""
    values, vectors = np.linalg.eigh(b.T.astype(np.float64) @ b.astype(np.float64))
    rows = (np.sqrt(np.clip(values, 0.0, None))[:, None] * vectors.T) @ a.astype(np.float64)
    norm = float(np.linalg.norm(rows))
    return np.asarray(rows / norm if norm > 0 else rows, np.float32)


def _check(names: Sequence[str]) -> None:
    if not names:
        raise ValueError("a router needs at least one expert, got none")


def _wide(features: FloatMatrix, width: int) -> Float64Array:
    if features.ndim != 2 or features.shape[1] != width:
        raise ShapeError(f"features must be a matrix with {width} columns, got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold a NaN or an infinity; the base model's pass over this prompt went wrong")
    return features.astype(np.float64)


def _softmax(scores: Float64Array) -> Float64Array:
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
