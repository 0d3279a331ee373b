"""Six abilities of every policy on a scale from 0 to 1, computed from records."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from fedmoe.lora.adapter import Float64Array
from fedmoe.monitor.arena_series import ArenaSeries, smoothed, window

#: Ability -> how it is brought to [0, 1]; shown below the chart.
AXES = {
    "accuracy": "mean seat score over the last fifth of the iterations",
    "valid moves": "share of actions that were legal or could be parsed, over the same iterations",
    "efficiency": "reward per 1000 tokens over the same iterations, as a share of the best policy's",
    "cooperation": "0.5 + 0.5 d / max |d|, d the difference credit over the same iterations; 0.5: adds nothing",
    "rating": "chance to beat the field: Φ((μ - mean μ) / √(2β² + σ²)), β = 25/6; 0.5 is average",
    "stability": "1 - sd / half range; sd of the last rewards around their trend, range of all policies' rewards",
}
#: OpenSkill's and TrueSkill's spread of one performance, on their usual scale (mean 25, sigma 25/3).
_BETA = 25 / 6


def capabilities(series: ArenaSeries) -> dict[str, dict[str, float]]:
    """policy -> ability -> value in [0, 1], NaN where it was not recorded; `AXES` has the formulas."""
    recent = {policy: table.recent for policy, table in series.tables.items()}
    efficiency = {policy: series.tables[policy].weighted("efficiency_token", "tokens") for policy in series.policies}
    credit = {policy: table.recent("difference") for policy, table in series.credit.items()}
    return {
        policy: {
            "accuracy": _clipped(recent[policy]("accuracy")),
            "valid moves": _clipped(recent[policy]("valid")),
            "efficiency": _clipped(_share_of_best(efficiency, policy)),
            "cooperation": _clipped(_around_half(credit, policy)),
            "rating": _clipped(_chance_to_win(series, policy)),
            "stability": _clipped(_stability(series, policy)),
        }
        for policy in series.policies
    }


def present_axes(values: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The abilities that at least one policy has a value for."""
    return [name for name in AXES if any(math.isfinite(abilities[name]) for abilities in values.values())]


def _clipped(value: float) -> float:
    return min(1.0, max(0.0, value)) if math.isfinite(value) else math.nan


def _share_of_best(values: Mapping[str, float], policy: str) -> float:
    best = max((value for value in values.values() if math.isfinite(value)), default=math.nan)
    return values[policy] / best if best > 0 else math.nan


def _around_half(values: Mapping[str, float], policy: str) -> float:
    largest = max((abs(value) for value in values.values() if math.isfinite(value)), default=math.nan)
    return 0.5 + 0.5 * values[policy] / largest if largest > 0 else (0.5 if largest == 0 else math.nan)


def _chance_to_win(series: ArenaSeries, policy: str) -> float:
    mus = [mu for table in series.rating.values() if math.isfinite(mu := table.last("mu"))]
    mu, sigma = series.rating[policy].last("mu"), series.rating[policy].last("sigma")
    if not mus or not math.isfinite(mu):
        return math.nan
    variance = 2 * _BETA**2 + (sigma**2 if math.isfinite(sigma) else 0.0)
    return 0.5 * (1 + math.erf((mu - sum(mus) / len(mus)) / math.sqrt(2 * variance)))


def _stability(series: ArenaSeries, policy: str) -> float:
    rewards = {name: table.points("reward")[1] for name, table in series.tables.items()}
    everything = np.concatenate(list(rewards.values()))
    if len(rewards[policy]) < 3:
        return math.nan
    half_range = float(np.ptp(everything)) / 2
    return 1 - _spread(rewards[policy]) / half_range if half_range > 0 else 1.0


def _spread(values: Float64Array) -> float:
    """Standard deviation of the recent values around a short moving average of all of them."""
    rest = (values - smoothed(values, 5))[-window(len(values)) :]
    return float(rest.std())
