"""Performance chart: every trained policy beside the base model, and its share of games won, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedmoe.lora.adapter import Float64Array
from fedmoe.monitor.arena_series import ArenaSeries, Estimate, EvaluationPoint, window
from fedmoe.monitor.charts.style import dress, interval_bar, new_figure, plain, policy_rows, say_empty
from fedmoe.monitor.palette import INK, MUTED, policy_colour

_BASE = "#B8C0CA"


def model_performance(series: ArenaSeries) -> Figure:
    """Two panels of bars: scores after and before training, and win rates, as measured on held-out episodes."""
    final = series.final_evaluations()
    newest = {point.policy: point for point in sorted(final, key=lambda point: point.iteration)}
    scored = [newest[policy] for policy in dict.fromkeys(point.policy for point in final)]
    scored = [point for point in scored if math.isfinite(point.score.value)]
    played = [point for point in final if math.isfinite(point.win.value)]
    rows = max(2 * len(scored or series.policies), len(played), 4)
    title = "Final performance against the base model"
    foot = "Whiskers: confidence intervals as recorded by the evaluation.  *: the two intervals do not overlap."
    if not scored:
        title = "Accuracy at the start and at the end of training"
        foot = "Whiskers: 95 % normal intervals of the mean over those iterations; held-out scores were not recorded."
    figure = new_figure(series, title, _episodes(final), 13, 1.7 + 0.4 * rows, foot)
    left, right = figure.subplots(1, 2)
    if scored:
        dress(left, "Held-out score: base model (grey) and trained", "score (0 to 1)", grid="x")
        _pairs(left, series, [(point.policy, point.score, point.base) for point in scored])
    else:
        _training_only(left, series)
    _wins(right, series, played)
    return figure


def _episodes(final: Sequence[EvaluationPoint]) -> str:
    counts = sorted({f"{point.episodes:.0f}" for point in final if math.isfinite(point.episodes)}, key=int)
    if not counts:
        return ""
    text = f"evaluated on {'–'.join(dict.fromkeys((counts[0], counts[-1])))} episodes each"
    questions = [point.questions for point in final if math.isfinite(point.questions)]
    few = ": too few to say much of others" if any(point.few for point in final) else ""
    return f"{text}, about {min(questions):.0f} different questions{few}" if questions else text


def _pairs(axes: Axes, series: ArenaSeries, rows: Sequence[tuple[str, Estimate, Estimate]]) -> None:
    """Two bars for each policy, the second value in grey below the first."""
    top = max(_reach(estimate) for _, *pair in rows for estimate in pair)
    low = min(0.0, *(estimate.value for _, *pair in rows for estimate in pair if math.isfinite(estimate.value)))
    for place, (policy, after, before) in enumerate(rows):
        _bar(axes, place - 0.19, 0.36, after, policy_colour(series, policy), top, _change(after, before))
        _bar(axes, place + 0.19, 0.36, before, _BASE, top, f"{before.value:.2f}")
    axes.set_xlim(low * 1.1, top * 1.25 or 1.0)
    axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= max(top, 1.0)])
    axes.set_xlim(low * 1.1, top * 1.25 or 1.0)
    policies = [policy for policy, *_ in rows]
    _rows(axes, series, policies, policies)


def _change(after: Estimate, before: Estimate) -> str:
    """The value and its gain, with a star when the intervals are apart."""
    gain = after.value - before.value
    if not math.isfinite(gain):
        return f"{after.value:.2f}"
    apart = after.low > before.high or after.high < before.low
    return f"{after.value:.2f}   {gain:+.2f}{'*' if apart else ''}"


def _bar(axes: Axes, place: float, height: float, estimate: Estimate, colour: str, top: float, label: str) -> None:
    if math.isfinite(estimate.value):
        interval_bar(axes, place, height, estimate, colour)
        axes.text(_reach(estimate) + 0.02 * top, place, label, va="center", size=8.5, color=INK)


def _reach(estimate: Estimate) -> float:
    return max((end for end in (estimate.value, estimate.high, 0.0) if math.isfinite(end)), default=0.0)


def _rows(axes: Axes, series: ArenaSeries, policies: Sequence[str], names: Sequence[str]) -> None:
    policy_rows(axes, series, policies, [plain(name, 30) for name in names], 9.5)
    axes.set_ylim(len(policies) - 0.45, -0.55)


def _training_only(axes: Axes, series: ArenaSeries) -> None:
    """Without evaluations: accuracy in training, the last iterations beside the first."""
    title = "Accuracy in training: first (grey) and last iterations"
    rows = [(policy, *_ends(series, policy)) for policy in series.policies]
    rows = [row for row in rows if math.isfinite(row[1].value)]
    if not rows:
        say_empty(axes, title, "no score and no accuracy recorded")
        return
    dress(axes, title, "mean seat score (0 to 1)", grid="x")
    _pairs(axes, series, rows)


def _ends(series: ArenaSeries, policy: str) -> tuple[Estimate, Estimate]:
    values = series.tables[policy].points("accuracy")[1]
    count = window(len(values))
    return _mean(values[len(values) - count :]), _mean(values[:count])


def _mean(values: Float64Array) -> Estimate:
    mean = float(values.mean()) if len(values) else math.nan
    half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Estimate(mean, mean - half, mean + half)


def _wins(axes: Axes, series: ArenaSeries, played: Sequence[EvaluationPoint]) -> None:
    if not played:
        say_empty(axes, "Win rate", "no win rates recorded")
        return
    played = sorted(played, key=lambda point: series.policies.index(point.policy))
    opponents = {point.opponent for point in played}
    against = f" against {plain(opponents.pop(), 28)}" if len(opponents) == 1 else ""
    dress(axes, f"Win rate{against} (dashed: even)", "games won (draws count half)", grid="x")
    for place, point in enumerate(played):
        colour = policy_colour(series, point.policy)
        _bar(axes, place, 0.6, point.win, colour, 1.0, f"{100 * point.win.value:.0f} %")
    axes.axvline(0.5, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, 1.14)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1.0], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    policies = [point.policy for point in played]
    games = [f"{plain(point.policy, 16)} – {plain(point.opponent, 14)}" for point in played]
    _rows(axes, series, policies, policies if against else games)
