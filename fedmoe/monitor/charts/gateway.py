"""Chart of what a gateway keeps of its experts: a heat map of all models on all domains, bars with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from fedmoe.monitor.arena_series import Estimate
from fedmoe.monitor.charts.style import blank_figure, dress, head_legend, interval_bar, plain, say_empty
from fedmoe.monitor.palette import INK, MUTED, POLICY_COLOURS

_GAIN = LinearSegmentedColormap.from_list("gain", ["#D55E00", "#FFFFFF", "#0072B2"])
_ROW_INCHES = 0.52
_BAR_INCHES = 0.34


@dataclass(frozen=True)
class GatewayResults:
    """What is drawn: `losses[model][domain]` in nats per token, the first model being the base.

    `own[domain]` names the domain's own expert, `retained[domain][model]` the share of its gain that others keep (1 is
    all of it), `uncertain` the domains where that gain may be none.
    """

    losses: Mapping[str, Mapping[str, float]]
    own: Mapping[str, str]
    retained: Mapping[str, Mapping[str, Estimate]]
    uncertain: Sequence[str] = ()
    note: str = ""

    @property
    def colours(self) -> dict[str, str]:
        """The models that bars are drawn for, each with its colour."""
        models = dict.fromkeys(model for shares in self.retained.values() for model in shares)
        return dict(zip(models, cycle(POLICY_COLOURS), strict=False))


def gateway_figure(results: GatewayResults) -> Figure:
    """Left: change of held-out loss against the base model. Right: gain kept, with 95 % intervals."""
    bars = len(results.retained) * (len(results.colours) + 0.8)
    height = 2.2 + max(_ROW_INCHES * len(results.losses), _BAR_INCHES * bars, 1.6)
    heat_width = 2.4 + 1.25 * len(next(iter(results.losses.values())))
    foot = (
        "Left: nats per token; blue is better than the base model, boxed the domain's own expert.\n"
        "Right: (base − model) / (base − own expert), 95 % intervals from a paired bootstrap over held-out blocks."
    )
    foot += "  ?: the own gain may be none." if results.uncertain else ""
    title = "What the gateway keeps of its experts"
    figure = blank_figure(title, plain(results.note, 110), heat_width + 6.4, height, foot)
    heat, shares = figure.subplots(1, 2, width_ratios=(heat_width, 6.0))
    _heat_map(heat, results)
    _bars(shares, results)
    if len(results.colours) > 1:
        models = [Patch(color=colour, label=plain(model, 18)) for model, colour in results.colours.items()]
        head_legend(figure, models)
    return figure


def _heat_map(axes: Axes, results: GatewayResults) -> None:
    models, domains = list(results.losses), list(next(iter(results.losses.values())))
    base = results.losses[models[0]]
    gains = np.array([[base[domain] - results.losses[model][domain] for domain in domains] for model in models])
    reach = max(float(np.abs(gains).max()), 1e-6)
    axes.pcolormesh(gains, cmap=_GAIN, norm=TwoSlopeNorm(0, -reach, reach), edgecolor="white", linewidth=2)
    dress(axes, "Held-out loss, and change", grid="")
    for row, model in enumerate(models):
        for column, domain in enumerate(domains):
            loss, gain = f"{results.losses[model][domain]:.3f}", gains[row, column]
            text = f"{loss}\n{-gain:+.3f}".replace("-", "−") if row else loss
            style = {"ha": "center", "va": "center", "size": 9, "linespacing": 1.25}
            axes.text(column + 0.5, row + 0.5, text, style, color="white" if abs(gain) > 0.6 * reach else INK)
            if results.own.get(domain) == model:
                box = Rectangle((column + 0.03, row + 0.05), 0.94, 0.9, fill=False, edgecolor=INK, linewidth=1.6)
                axes.add_patch(box)
    axes.set_xticks(np.arange(len(domains)) + 0.5, [plain(domain, 14) for domain in domains], size=9.5, color=INK)
    axes.set_yticks(np.arange(len(models)) + 0.5, [plain(model, 24) for model in models], size=9.5, color=INK)
    axes.set_ylim(len(models), 0)
    axes.spines["bottom"].set_visible(False)


def _bars(axes: Axes, results: GatewayResults) -> None:
    title = "Share of the own expert's gain that is kept"
    if not results.retained:
        say_empty(axes, title, "no domain has an expert of its own")
        return
    dress(axes, title, grid="x")
    colours, (low, high) = results.colours, _limits(results)
    reach = high - low
    centres = []
    for group, (domain, shares) in enumerate(results.retained.items()):
        top = group * (len(colours) + 0.8)
        centres.append(top + (len(colours) - 1) / 2)
        for place, (model, share) in enumerate(shares.items()):
            if math.isfinite(share.value) and domain in results.uncertain:
                axes.barh(top + place, share.value, 0.8, color=colours[model], alpha=0.35)
            elif math.isfinite(share.value):
                interval_bar(axes, top + place, 0.8, share, colours[model])
            axes.text(high + 0.04 * reach, top + place, _label(share), va="center", size=8.5, color=INK)
    axes.axvline(1, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    axes.axvline(0, color="#B8C0CA", linewidth=1, zorder=0)
    # A column at the right for the numbers, where no line crosses them.
    axes.set_xlim(low, high + 0.3 * reach)
    axes.set_xticks([tick for tick in axes.get_xticks() if low - 1e-9 <= tick <= high + 1e-9])
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %".replace("-", "−"))
    axes.set_xlim(low, high + 0.3 * reach)
    names = [plain(domain, 14) + (" ?" if domain in results.uncertain else "") for domain in results.retained]
    axes.set_yticks(centres, names, size=9.5, color=INK)
    axes.set_ylim(centres[-1] + (len(colours) - 1) / 2 + 0.8, -0.8)


def _limits(results: GatewayResults) -> tuple[float, float]:
    """The axis: from 0 (or below) to all of the gain (or above); whiskers of uncertain domains may leave it."""
    ends = [1.0, 0.0]
    for domain, shares in results.retained.items():
        for share in shares.values():
            ends += [share.value] if domain in results.uncertain else [share.value, share.low, share.high]
    finite = [min(max(end, -1.0), 2.0) for end in ends if math.isfinite(end)]
    return min(finite) - (0.05 if min(finite) < 0 else 0.0), max(finite)


def _label(share: Estimate) -> str:
    if not all(math.isfinite(number) for number in (share.value, share.low, share.high)):
        return "no number"
    return f"{100 * share.value:.0f} %  ({100 * share.low:.0f} to {100 * share.high:.0f})".replace("-", "−")
