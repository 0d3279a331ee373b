"""Tables of what a start takes: imports and the way to a first answer, and tokens of the data."""

from __future__ import annotations

from collections.abc import Mapping

from lib.table_text import Row, results, spread, table

_STARTS = {
    "help": "`fedmoe --help`",
    "coordinator": "a coordinator until it listens",
    "worker": "what a worker imports before its base model",
}
_ALONE = {
    "libraries": "`import torch, transformers` alone",
    "with_models": "the same with `transformers.modeling_utils`",
}


def _cell(values: Mapping[str, float]) -> str:
    return spread(values["median"], values["minimum"], values["maximum"], 2)


def startup() -> str:
    """Both builds in turns, and the libraries alone in the same rounds."""
    rows: list[Row] = []
    measured = results("startup")["measured"]
    for case, title in _STARTS.items():
        row = measured[case]
        rows.append([title, _cell(row["before"]), _cell(row["now"]), _cell(row["ratio"])])
    rows += [[title, "", _cell(measured["worker"][name]), ""] for name, title in _ALONE.items()]
    return table(["", "before, CPU s", "now, CPU s", "now / before"], rows)


def tokenize() -> str:
    """Both builds in turns; figures for a million rows are extrapolated."""
    found = results("tokenize")
    rows: list[Row] = []
    for processes, row in found["processes"].items():
        for unit, title in (("cpu", "CPU"), ("wall", "wall")):
            minutes = [f"{row[f'{side}_{unit}_minutes_a_million_extrapolated']:.0f}" for side in ("before", "now")]
            seconds = [_cell(row[unit][side]) for side in ("before", "now", "ratio")]
            rows.append([f"{processes}, {title}", *seconds, " / ".join(minutes), "yes" if row["same_result"] else "no"])
    following = found["next_start"]
    minutes = following["cpu"] / following["rows"] * 1e6 / 60
    rows.append(["next start, CPU", "", f"{following['cpu']:.2f}", "", f"{minutes:.1f}", "yes"])
    header = ["processes", "before, s", "now, s", "now / before", "minutes a million rows, before / now", "same bits"]
    return table(header, rows)
