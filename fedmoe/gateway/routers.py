"""Prompt router: the expert or the merged adapter for a prompt, from features of the base model and likelihoods.

The router turns feature vectors, one row a prompt, into a probability for every expert; it needs a few numbers from
each expert's workers. Its likeliest experts and the merged adapter are ranked again by likelihood. A router knows whose
prompts look like this one, an adapter whether it can do anything with it: experts that a router cannot tell apart are
told apart by the likelihood that each gives the prompt, and a prompt of no expert's domain shows in the merged adapter
explaining it better. That needs nothing but the adapters themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.lora.adapter import Float64Array, FloatMatrix, ShapeError
from fedmoe.lora.prompt_statistics import FeatureMoments, PromptStatistics, orthogonal_rows


@dataclass(frozen=True, eq=False)
class SequenceRouter:
    """Linear discriminant analysis: a centroid for every expert and one covariance for all.

    log p(expert | x) = x' weights + offsets + a constant: `weights` (d, experts), `offsets` (experts,), float64. The
    experts' `names` are in order; prompt features have d numbers, see `fedmoe.models.prompt_features`.
    """

    names: tuple[str, ...]
    weights: Float64Array
    offsets: Float64Array

    def __post_init__(self) -> None:
        if self.weights.ndim != 2 or {self.weights.shape[1:], self.offsets.shape} != {(len(self.names),)}:
            raise ShapeError(
                f"{len(self.names)} experts need a column of weights and an offset each, "
                f"got {self.weights.shape} and {self.offsets.shape}"
            )

    @property
    def width(self) -> int:
        """Numbers in one prompt's features."""
        return int(self.weights.shape[0])

    def probabilities(self, features: FloatMatrix) -> Float64Array:
        """features (prompts, width) -> (prompts, experts), rows that add up to 1; raises `ShapeError`."""
        return softmax(wide(features, self.width) @ self.weights + self.offsets)

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
        if not names:
            raise ValueError("a router needs at least one expert, got none")
        if len({part.width for part in statistics.values()}) > 1:
            got = {name: statistics[name].width for name in names}
            raise ShapeError(f"prompt features must have one width, of one base model; got {got}")
        first = [statistics[name].first for name in names]
        second = [statistics[name].second for name in names]
        temperature = _temperature([(first, second), (second, first)], shrinkage) if len(names) > 1 else 1.0
        weights, offsets = _discriminants([statistics[name].together() for name in names], shrinkage)
        return cls(names, weights / temperature, offsets / temperature)


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


def wide(features: FloatMatrix, width: int) -> Float64Array:
    """The features (prompts, width) in float64; refuses other shapes and what is not finite."""
    if features.ndim != 2 or features.shape[1] != width:
        raise ShapeError(f"features must be a matrix with {width} columns, got shape {features.shape}")
    if not np.isfinite(features).all():
        raise ValueError("features hold a NaN or an infinity; the base model's pass over this prompt went wrong")
    return features.astype(np.float64)


def softmax(scores: Float64Array) -> Float64Array:
    """Scores (prompts, experts) as probabilities."""
    powers = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


#: How many experts are looked at again, and how likely one must be for that.
MOST, LEAST = 3, 0.01
#: Of a long prompt so many tokens, its first, are enough.
SEEN = 128
#: What a nat of log-likelihood counts beside a nat of the router's: tokens of one text say the same again and again,
#: and experts are no calibrated models of their domains.
TRUST = 0.2
#: What the merged adapter starts with: beside a sure router it has to explain a prompt better by -ln(0.8) / TRUST = 1.1
#: nats to get it, and where the router knows nothing it gets the prompt unless an expert explains it better by far.
MERGED_PRIOR = 0.8


@dataclass(frozen=True, slots=True)
class ExpertCandidates:
    """The tokens of a prompt to look at again, and the natural logarithm of each likely expert's probability."""

    text: tuple[int, ...]
    log_priors: Mapping[str, float]


def candidates(text: Sequence[int], names: Sequence[str], probabilities: Float64Array) -> ExpertCandidates:
    """The likeliest experts of one prompt: `probabilities` (experts,) as a router gives them for `names`."""
    likely = [place for place in np.argsort(-probabilities, kind="stable")[:MOST] if probabilities[place] >= LEAST]
    # A row of many experts, all alike, may leave none above LEAST; the likeliest always stays.
    likely = likely or [np.argmax(probabilities)]
    return ExpertCandidates(tuple(text[:SEEN]), {names[place]: float(np.log(probabilities[place])) for place in likely})


def choose(candidates: ExpertCandidates, log_likelihoods: Mapping[str, float], merged: str) -> str:
    """The expert or `merged` with the highest ln prior + TRUST ln p(text); ties go to the first name.

    `log_likelihoods` are in nats, by name: of every candidate, and of `merged` where there is a merged adapter. Raises
    ValueError for one that is missing or not a number.
    """
    priors = dict(candidates.log_priors)
    if merged in log_likelihoods:
        priors[merged] = float(np.log(MERGED_PRIOR))
    scores = {name: prior + TRUST * log_likelihoods.get(name, np.nan) for name, prior in priors.items()}
    wrong = sorted(name for name, score in scores.items() if not np.isfinite(score))
    if wrong:
        raise ValueError(f"a finite log-likelihood is needed of {', '.join(priors)}; there is none of {wrong[:5]}")
    return min(scores, key=lambda name: (-scores[name], name))
