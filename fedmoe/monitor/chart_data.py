"""What charts and interactive page show of a run, computed once for both: curves, layers, tables, abilities."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedmoe.lora.adapter import Float64Array
from fedmoe.monitor.arena_series import ArenaSeries, SeriesTable, smoothed, smoothing_span, window
from fedmoe.monitor.palette import POLICY_COLOURS, policy_colour, policy_dash

#: The trends: column, title, unit.
TREND_PANELS = (
    ("reward", "Reward", "mean reward per episode"),
    ("accuracy", "Accuracy", "mean seat score (0 to 1)"),
    ("kl", "Movement since sampling", "KL divergence (nats per token)"),
    ("entropy", "Entropy", "entropy (nats per token)"),
)
_CREDIT_PARTS = ("shared", "individual", "difference", "versus")
#: Column -> the name of its curve.
_TEAM = {name: name.replace("_", " ") for name in ("team_score", "completion", "utilisation", "cooperation")}
_SYSTEM = {"cpu_percent": "CPU", "memory_percent": "memory", "gpu_percent": "GPU", "disk_percent": "disk"}
#: The two ends and the middle of the colours of credit: below 0, 0, above.
CREDIT_COLOURS = ("#D98550", "#FFFFFF", "#5B9CCB")


@dataclass(frozen=True, slots=True)
class Curve:
    """A curve with at least one point: `x` and `y` as recorded, `smooth` their moving average, all float64 (n,)."""

    name: str
    colour: str
    x: Float64Array
    y: Float64Array
    smooth: Float64Array
    dash: str = "-"


def policy_curves(series: ArenaSeries, tables: Mapping[str, SeriesTable], column: str) -> list[Curve]:
    """A column of the tables of policies over the iterations."""
    span, points = smoothing_span(series), {policy: table.points(column) for policy, table in tables.items()}
    return [
        Curve(policy, policy_colour(series, policy), x, y, smoothed(y, span), policy_dash(series, policy))
        for policy, (x, y) in points.items()
        if len(x)
    ]


def team_curves(series: ArenaSeries) -> list[Curve]:
    """Team score, completion, utilisation of the compute and cooperation over the iterations."""
    return _column_curves(series.team, _TEAM, smoothing_span(series))


def system_curves(series: ArenaSeries) -> list[Curve]:
    """Use of CPU, memory, GPU and disk in percent over the seconds since the start."""
    return _column_curves(series.system, _SYSTEM, min(15.0, len(series.system) / 8))


def _column_curves(table: SeriesTable, names: Mapping[str, str], span: float) -> list[Curve]:
    points = {column: table.points(column) for column in names}
    return [
        Curve(names[column], colour, x, y, smoothed(y, span))
        for (column, (x, y)), colour in zip(points.items(), POLICY_COLOURS, strict=False)
        if len(x)
    ]


def rating_curves(series: ArenaSeries) -> list[tuple[Curve, Float64Array]]:
    """The skill rating of every policy, as recorded, with its sigma (n,)."""
    curves = policy_curves(series, series.rating, "mu")
    tables = [series.rating[curve.name] for curve in curves]
    sigmas = [np.nan_to_num(table.column("sigma")[np.isfinite(table.column("mu"))]) for table in tables]
    return list(zip(curves, sigmas, strict=True))


def time_layers(series: ArenaSeries) -> list[Curve]:
    """Seconds of every iteration by what they were spent on, averaged: a layer from its `y` up to its `smooth`."""
    x, total = series.timing.points("iteration_seconds")
    there, span = np.isfinite(series.timing.column("iteration_seconds")), smoothing_span(series)
    layers, below = list[Curve](), np.zeros(len(x))
    for name, colour in (("rollout", POLICY_COLOURS[5]), ("learn", POLICY_COLOURS[4])):
        above = below + smoothed(np.nan_to_num(series.timing.column(f"{name}_seconds")[there]), span)
        layers.append(Curve(name, colour, x, below, above))
        below = above
    layers.append(Curve("other", "#6B7683", x, below, np.maximum(smoothed(total, span), below)))
    return layers if len(x) else []


def credit_table(series: ArenaSeries) -> tuple[list[str], list[str], Float64Array] | None:
    """Policies, recorded parts of the credit, recent means (policies, parts), NaN where there is none; None without."""
    policies = [policy for policy in series.policies if len(series.credit[policy])]
    values = {part: [series.credit[policy].recent(part) for policy in policies] for part in _CREDIT_PARTS}
    parts = [part for part in values if np.isfinite(values[part]).any()]
    return (policies, parts, np.array([values[part] for part in parts]).T) if parts else None


@dataclass(frozen=True, slots=True)
class RewardGrid:
    """Mean rewards: `values` (policies, b), NaN where a policy has none; `starts`, `lengths` (b,) in iterations.

    Policies stand by rising recent reward, so that low ones in front hide nothing. `width` is the length of every
    stretch: 1 shows each iteration by itself.
    """

    policies: tuple[str, ...]
    starts: Float64Array
    lengths: Float64Array
    values: Float64Array
    width: float


def reward_grid(series: ArenaSeries, bins: int) -> RewardGrid | None:
    """Rewards of all policies that have any, in at most `bins` stretches of equally many iterations; None without."""
    points = {policy: table.points("reward") for policy, table in series.tables.items()}
    recorded = (policy for policy in series.policies if len(points[policy][0]))
    policies = tuple(sorted(recorded, key=lambda policy: series.tables[policy].recent("reward")))
    if not policies:
        return None
    first = min(float(points[policy][0][0]) for policy in policies)
    last = max(float(points[policy][0][-1]) for policy in policies)
    width = float(math.ceil((last - first + 1) / bins))
    count = int((last - first) // width) + 1
    edges: Float64Array = first - 0.5 + width * np.arange(count + 1, dtype=np.float64)
    counts = np.stack([np.histogram(points[policy][0], edges)[0] for policy in policies])
    sums = np.stack([np.histogram(x, edges, weights=y)[0] for x, y in map(points.__getitem__, policies)])
    values = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    # The last stretch ends where the run ends.
    lengths = np.minimum(width, last + 0.5 - edges[:-1])
    return RewardGrid(policies, edges[:-1], lengths, values, width)


#: Ability -> how it is brought to [0, 1]; shown below the chart.
ABILITIES = {
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
    """policy -> ability -> value in [0, 1], NaN where it was not recorded; `ABILITIES` has the formulas."""
    tables = series.tables
    efficiency = {policy: table.weighted("efficiency_token", "tokens") for policy, table in tables.items()}
    best = max((value for value in efficiency.values() if math.isfinite(value)), default=math.nan)
    credit = {policy: table.recent("difference") for policy, table in series.credit.items()}
    values = {
        policy: {
            "accuracy": tables[policy].recent("accuracy"),
            "valid moves": tables[policy].recent("valid"),
            "efficiency": efficiency[policy] / best if best > 0 else math.nan,
            "cooperation": _around_half(credit, policy),
            "rating": _chance_to_win(series, policy),
            "stability": _stability(series, policy),
        }
        for policy in series.policies
    }
    return {
        policy: {name: min(1.0, max(0.0, value)) if math.isfinite(value) else math.nan for name, value in row.items()}
        for policy, row in values.items()
    }


def recorded_abilities(values: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The abilities that at least one policy has a value for."""
    return [name for name in ABILITIES if any(math.isfinite(abilities[name]) for abilities in values.values())]


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
    values = rewards[policy]
    if len(values) < 3:
        return math.nan
    half_range = float(np.ptp(np.concatenate(list(rewards.values())))) / 2
    # Around a short moving average of all of them.
    recent = (values - smoothed(values, 5))[-window(len(values)) :]
    return 1 - float(recent.std()) / half_range if half_range > 0 else 1.0
