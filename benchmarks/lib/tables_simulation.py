"""Tables of simulations: ten thousand workers, and fifty that train."""

from __future__ import annotations

from typing import Any

from lib.table_text import Row, percent, results, table

_NEVER = "never"


def scale() -> str:
    """What it took, and what the report says."""
    measured = results("simulation_scale")
    (scheme,) = measured["report"]["schemes"]
    staleness, each = scheme["staleness"], scheme["accepted_by_worker"]
    cells = {
        "updates": scheme["name"],
        "accepted": f"{scheme['updates']['accepted']:,}",
        "least by a worker": str(each["least"]),
        "staleness p50 / p99": f"{staleness['median']} / {staleness['p99']}",
        "a second, mean / most": "{mean:.0f} / {most:,}".format(**scheme["arrivals_per_second"]),
        "GB up": f"{scheme['bytes']['up'] / 1e9:.2f}",
        "GB down": f"{scheme['bytes']['down'] / 1e9:.2f}",
        "GB disk": f"{sum(scheme['disk_bytes'].values()) / 1e9:.2f}",
        "wall s": f"{measured['seconds']:.0f}",
        "CPU s": f"{measured['cpu_seconds']:.0f}",
        "peak GiB": f"{measured['peak_mib'] / 1024:.2f}",
    }
    return table(list(cells), [list(cells.values())])


def traffic(part: str) -> str:
    """What travelled and became of it, on the configured fleet of a part of the benchmark."""
    rows: list[Row] = []
    for scheme in results(f"simulation_{part}")["report"]["schemes"]:
        if scheme["fleet"] == "configured":
            staleness = scheme["staleness"]
            rows.append(
                [
                    scheme["name"],
                    f"{scheme['steps']:,}",
                    f"{scheme['updates']['accepted']:,}",
                    f"{sum(scheme['updates']['refused'].values()):,}",
                    f"{staleness['median']} / {staleness['p99']}",
                    f"{scheme['bytes']['up'] / 1e6:.1f}",
                    f"{scheme['bytes']['down'] / 1e6:.1f}",
                    f"{sum(scheme['disk_bytes'].values()) / 1e6:.1f}",
                ]
            )
    return table(
        ["scheme", "steps", "accepted", "too stale", "staleness p50 / p99", "MB up", "MB down", "MB disk"], rows
    )


def training(part: str) -> str:
    """*Cost to Target* and *Quality under Budget* of a part of the benchmark."""
    rows: list[Row] = []
    for each in results(f"simulation_{part}")["report"]["comparison"]:
        cost, quality = each["cost_to_target"], each["quality_under_budget"]
        rows.append(
            [
                each["name"],
                _number(cost["seconds"], ".0f"),
                _percent(cost["seconds_of_baseline"]),
                _number(_both(cost), ".1f"),
                f"{quality['seconds']:.2f}",
                f"{quality['megabytes']:.2f}",
                f"{each['lowest_loss']:.2f}",
                _percent(each["gain_of_baseline"]),
            ]
        )
    header = ["scheme", "s to target", "of baseline", "MB to target", "loss in time", "loss in traffic", "lowest loss"]
    return table([*header, "gain of baseline"], rows)


def robustness() -> str:
    """*Robustness*."""
    rows = [
        [
            each["name"],
            _percent(each["robustness"]["gain_of_ideal"]),
            _number(each["cost_to_target"]["seconds"], ".0f"),
            _number(each["robustness"]["seconds_to_target_ideal"], ".0f"),
        ]
        for each in results("simulation_training")["report"]["comparison"]
        if "robustness" in each
    ]
    return table(["scheme", "gain kept", "s to target", "s to target, ideal fleet"], rows)


def _both(cost: Any) -> float | None:
    return None if cost["seconds"] is None else cost["megabytes_up"] + cost["megabytes_down"]


def _number(value: float | None, form: str) -> str:
    return _NEVER if value is None else format(value, form)


def _percent(value: float | None) -> str:
    return _NEVER if value is None else f"{percent(value)} %"
