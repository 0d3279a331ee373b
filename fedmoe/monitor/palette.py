"""Colours, texts and number formats shared by charts, interactive page and terminal; no drawing library."""

from __future__ import annotations

from collections.abc import Callable

from fedmoe.monitor.arena_series import ArenaSeries

INK = "#1F2933"
MUTED = "#5F6B7A"
SAMPLE_COLOUR = "#B3261E"
SAMPLE_TEXT = "SAMPLE DATA  ·  made-up numbers that show what the charts look like; nothing was trained or measured"

#: Okabe and Ito's colours that stand out on white, then two of Tol's: distinguishable with any colour vision.
POLICY_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#555555")
_TINTS = {"cooperative": "#E3F2EA", "competitive": "#FCEBDD", "team_battle": "#E4EBF8", "mixed": "#F1EAF6"}
_OTHER_TINTS = ("#FBF6D9", "#E2F3F5", "#F6E6EE", "#ECECEC")


def policy_colour(series: ArenaSeries, policy: str) -> str:
    """A policy's colour, the same in every chart of a run; beyond eight they come again. Black for the whole run."""
    return POLICY_COLOURS[series.policies.index(policy) % len(POLICY_COLOURS)] if policy in series.policies else INK


def policy_dash(series: ArenaSeries, policy: str) -> str:
    """A policy's line: solid for the first eight, broken where colours come again."""
    return ("-", "--", ":")[series.policies.index(policy) // len(POLICY_COLOURS) % 3]


def faded(colour: str, opacity: float) -> str:
    """A colour `#RRGGBB` as CSS with an opacity in [0, 1]."""
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:g})"


def mode_tint(mode: str) -> str:
    """A light background colour for a mode, whichever part of it is played; modes of one's own get one by name."""
    name = mode.partition(":")[0].replace("-", "_").replace(" ", "_").lower()
    return _TINTS.get(name) or _OTHER_TINTS[sum(name.encode()) % len(_OTHER_TINTS)]


def run_line(series: ArenaSeries, plain: Callable[[str, int], str]) -> str:
    """One line on what ran; `plain(text, longest)` makes text of records fit to show."""
    facts, (first, last) = series.facts, series.iterations
    parts = [f"{plain(facts.task, 34)}" if facts.task else ""]
    parts += [f"base {plain(facts.base_model, 34)}" if facts.base_model else ""]
    parts += [f"{plain(facts.mode.replace('_', ' '), 20)} mode" if facts.mode else ""]
    parts += [f"seed {plain(facts.seed, 12)}" if facts.seed else ""]
    parts += [f"iterations {first:.0f}–{last:.0f}" if series.iterations != (0.0, 0.0) else ""]
    return "  ·  ".join(part for part in parts if part)


def short(value: float) -> str:
    """A number for a label: 1234567 -> 1.23 M, 0.00042 -> 0.00042, NaN -> a dash."""
    if value != value:
        return "–"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.3g}"
