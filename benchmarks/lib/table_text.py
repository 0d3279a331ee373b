"""Markdown tables from result files: reading a result, cells with spread or interval, rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib.harness import RESULTS

Row = Sequence[str]


def document(name: str) -> Any:
    """The whole file `results/<name>.json`, with commit, hardware and arguments."""
    return json.loads((RESULTS / f"{name}.json").read_bytes())


def results(name: str) -> Any:
    """What was measured, as the benchmark wrote it."""
    return document(name)["results"]


def table(header: Row, rows: Iterable[Row]) -> str:
    """The table as Markdown, a line a row."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|" for cells in lines)


def spread(median: float, low: float, high: float, digits: int = 1) -> str:
    """A median with what lies around it: `3.4 (3.2-3.4)`."""
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def significant(value: float, digits: int) -> str:
    """So many significant digits, thousands with commas: `0.12`, `10,600`."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if rounded >= 10 ** (digits - 1) else f"{rounded:#.{digits}g}"


def percent(share: float) -> str:
    return str(round(100 * share))


def percent_interval(share: Mapping[str, float]) -> str:
    """A share with its 95 % interval, in percent: `92 (86-97)`."""
    return f"{percent(share['value'])} ({percent(share['low'])}-{percent(share['high'])})"
