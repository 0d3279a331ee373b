"""Retained gain: the share of each expert's gain that a model keeps, (base - x) / (base - own expert), with intervals.

The intervals come from a paired bootstrap over the held-out blocks: base, expert and x are resampled together, so what
makes a block hard for all of them cancels. They say nothing about other seeds of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.gateway.losses import BASE, LossMatrix
from fedmoe.lora.adapter import Float64Array

LEVEL = 0.95
SAMPLES = 2000


@dataclass(frozen=True, slots=True)
class BootstrapInterval:
    """A value and the interval that holds the middle `LEVEL` of its bootstrap distribution."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class DomainGain:
    """One domain: the gain of its own expert in nats per token, and the share of it that each model keeps."""

    domain: str
    expert: str
    own_gain: BootstrapInterval
    retained: Mapping[str, BootstrapInterval]

    @property
    def warning(self) -> str | None:
        """Why these shares mean nothing, or None: a share of a gain that may be none is noise."""
        if self.own_gain.low > 0:
            return None
        if math.isnan(self.own_gain.low):
            return f"{self.domain}: one held-out block gives no interval; give more held-out data"
        return (
            f"{self.domain}: the gain of {self.expert} may be none ({self.own_gain.value:+.3f} nats per token, "
            f"{self.own_gain.low:+.3f} to {self.own_gain.high:+.3f}); train it longer or give more held-out data"
        )


@dataclass(frozen=True)
class ModelSummary:
    """One model over all domains whose own gain is certain: its lowest share, where that is, and its mean share."""

    worst_domain: str
    worst: BootstrapInterval
    mean: BootstrapInterval


@dataclass(frozen=True)
class RetainedGains:
    """All domains, and a summary for each model; no summary where no domain's own gain is certain."""

    domains: tuple[DomainGain, ...]
    summaries: Mapping[str, ModelSummary]

    @property
    def warnings(self) -> list[str]:
        return [domain.warning for domain in self.domains if domain.warning]


def retained_gains(
    matrix: LossMatrix, own: Mapping[str, str], models: Sequence[str], seed: int = 0, samples: int = SAMPLES
) -> RetainedGains:
    """What each of `models` keeps of the gain of `own[domain]`, the expert of that domain.

    Needs the losses of blocks. Raises ValueError for a model or domain that the matrix does not have.
    """
    missing = sorted({BASE, *own.values(), *models} - matrix.block_losses.keys()) + sorted(own.keys() - matrix.tokens)
    if missing:
        raise ValueError(f"the matrix has no block losses of {', '.join(missing)}")
    names = [BASE, *models]
    domains = []
    draws: dict[str, Float64Array] = {}
    for place, (domain, expert) in enumerate(own.items()):
        sums = np.stack([matrix.sums(name, domain) for name in (*names, expert)])
        tokens = np.asarray(matrix.block_tokens[domain], np.float64)
        gain, shares = _domain(domain, expert, sums, tokens, models, np.random.default_rng([seed, place]), samples)
        domains.append(gain)
        if gain.warning is None:
            draws[domain] = shares
    return RetainedGains(tuple(domains), _summaries(models, domains, draws))


def _domain(
    domain: str,
    expert: str,
    sums: Float64Array,
    tokens: Float64Array,
    models: Sequence[str],
    random: np.random.Generator,
    samples: int,
) -> tuple[DomainGain, Float64Array]:
    """sums (base, models..., expert; blocks), tokens (blocks,) -> the domain, and draws of shares (models, samples)."""
    counts = random.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), samples).astype(np.float64)
    if np.count_nonzero(tokens) < 2:
        counts = counts[:0]  # one block says nothing about how blocks differ
    drawn = _losses(sums, tokens, counts[(counts @ tokens) > 0])
    gains, own = drawn[:1] - drawn[1:-1], drawn[0] - drawn[-1]
    exact = _losses(sums, tokens, np.ones((1, len(tokens))))[:, 0]
    own_gain = float(exact[0] - exact[-1])
    shares = np.divide(gains, own, out=np.full_like(gains, np.nan), where=own != 0)
    retained = {}
    for place, model in enumerate(models):
        gain = float(exact[0] - exact[1 + place])
        retained[model] = _interval(gain / own_gain if own_gain != 0 else math.nan, shares[place])
    return DomainGain(domain, expert, _interval(own_gain, own), retained), shares


def _losses(sums: Float64Array, tokens: Float64Array, counts: Float64Array) -> Float64Array:
    """Mean loss (models, samples) when block b is taken counts[sample, b] times."""
    return np.asarray((sums @ counts.T) / (counts @ tokens))


def _interval(value: float, draws: Float64Array) -> BootstrapInterval:
    finite = draws[np.isfinite(draws)]
    if not len(finite):
        return BootstrapInterval(value, math.nan, math.nan)
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return BootstrapInterval(value, float(low), float(high))


def _summaries(
    models: Sequence[str], domains: Sequence[DomainGain], draws: Mapping[str, Float64Array]
) -> dict[str, ModelSummary]:
    if not draws:
        return {}
    certain = [domain for domain in domains if domain.domain in draws]
    # A resample without a single token is left out, so that domains may have a few draws more or less.
    length = min(shares.shape[1] for shares in draws.values())
    drawn = np.stack([draws[domain.domain][:, :length] for domain in certain])
    summaries = {}
    for place, model in enumerate(models):
        values = [domain.retained[model].value for domain in certain]
        worst = int(np.argmin(values))
        summaries[model] = ModelSummary(
            certain[worst].domain,
            _interval(values[worst], drawn[:, place].min(axis=0)),
            _interval(float(np.mean(values)), drawn[:, place].mean(axis=0)),
        )
    return summaries
