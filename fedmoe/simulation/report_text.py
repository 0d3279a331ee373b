"""The report of a simulation as Markdown, and as rows of a short table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
Row = Sequence[str]

COUNTS = ("scheme", "accepted", "refused", "staleness p50 / p99", "MB up", "MB down", "MB disk")
COSTS = ("scheme", "seconds", "of baseline", "MB up", "MB down")
QUALITY = ("scheme", "loss in time", "loss in traffic", "lowest loss", "gain of baseline")
ROBUSTNESS = ("scheme", "gain kept", "seconds to target", "on the ideal fleet")
_NEVER = "not reached"


def count_rows(report: Report) -> Sequence[Row]:
    """What travelled and what became of it, a row a run."""
    rows = []
    for scheme in report["schemes"]:
        updates, staleness, disk = scheme["updates"], scheme["staleness"], scheme["disk_bytes"]
        rows.append(
            (
                scheme["name"] + (" (ideal fleet)" if scheme["fleet"] == "ideal" else ""),
                f"{updates['accepted']:,}",
                f"{sum(updates['refused'].values()):,}",
                f"{staleness['median']} / {staleness['p99']}",
                _megabytes(scheme["bytes"]["up"]),
                _megabytes(scheme["bytes"]["down"]),
                _megabytes(sum(disk.values())),
            )
        )
    return rows


def cost_rows(report: Report) -> Sequence[Row]:
    """*Cost to Target*, a row a scheme."""
    rows = []
    for each in report["comparison"]:
        cost = each["cost_to_target"]
        rows.append(
            (
                each["name"],
                _number(cost["seconds"], ",.0f"),
                _percent(cost["seconds_of_baseline"]),
                _number(cost["megabytes_up"], ",.1f"),
                _number(cost["megabytes_down"], ",.1f"),
            )
        )
    return rows


def quality_rows(report: Report) -> Sequence[Row]:
    """*Quality under Budget*, a row a scheme."""
    return [
        (
            each["name"],
            f"{each['quality_under_budget']['seconds']:.3f}",
            f"{each['quality_under_budget']['megabytes']:.3f}",
            f"{each['lowest_loss']:.3f}",
            _percent(each["gain_of_baseline"]),
        )
        for each in report["comparison"]
    ]


def robustness_rows(report: Report) -> Sequence[Row]:
    """*Robustness*, a row a scheme; none where it was not asked for."""
    return [
        (
            each["name"],
            _percent(each["robustness"]["gain_of_ideal"]),
            _number(each["cost_to_target"]["seconds"], ",.0f"),
            _number(each["robustness"]["seconds_to_target_ideal"], ",.0f"),
        )
        for each in report["comparison"]
        if "robustness" in each
    ]


def markdown(report: Report) -> str:
    """The whole report for people."""
    config = report["config"]
    fleet = config["fleet"]
    slowness = "/".join(f"{factor:g}" for factor in fleet["slowness"])
    parts = [
        "# Simulation",
        f"{report['note']} {fleet['workers']:,} workers of {fleet['experts']} experts, slowness {slowness}, "
        f"{report['parameters']:,} parameters, {config['seconds']:,g} s of the virtual clock, seed {config['seed']}.",
        "## Traffic",
        table(COUNTS, count_rows(report)),
    ]
    if report["work"] == "training":
        budgets = report["budgets"]
        parts += [
            "## Cost to Target",
            f"Until the held-out loss is at {report['target_loss']:.3f}, which is {config['report']['target']:.0%} of "
            f"the gain of *{report['baseline']}*; it begins at {report['first_loss']:.3f}.",
            table(COSTS, cost_rows(report)),
            "## Quality under Budget",
            f"The lowest held-out loss within {budgets['seconds']:,.0f} s, and within {budgets['megabytes']:,.1f} MB "
            "of traffic both ways.",
            table(QUALITY, quality_rows(report)),
        ]
        if robustness := robustness_rows(report):
            parts += [
                "## Robustness",
                "The gain beside that of the same scheme on workers of equal speed that are always there.",
                table(ROBUSTNESS, robustness),
            ]
    return "\n\n".join(parts) + "\n"


def table(header: Row, rows: Sequence[Row]) -> str:
    """A Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in cells)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"


def _number(value: float | None, form: str) -> str:
    return _NEVER if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return _NEVER if value is None else f"{value:.0%}"
