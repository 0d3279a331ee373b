"""Figures and tables of runs: what is drawn, and the same in CSV."""

from __future__ import annotations

import csv
import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from arena_records import series_of

from fedmoe.monitor.plot_series import arena_plot, csv_table, federation_plot
from fedmoe.runtime.records import Record

pytest.importorskip("matplotlib")

SVG = "{http://www.w3.org/2000/svg}"


def texts_and_curves(svg: bytes) -> tuple[list[str], list[str]]:
    """All texts of a picture, and the ids of its curves."""
    root = ET.fromstring(svg)
    texts = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
    curves = [group.get("id", "") for group in root.iter(f"{SVG}g") if group.get("id", "").startswith("curve-")]
    return texts, curves


def losses(worker: str, expert: str, kind: str, values: list[float], start: float = 1000.0) -> list[Record]:
    return [
        {"at": start + 10 * step, "kind": kind, "worker": worker, "expert": expert, "step": step, "loss": value}
        for step, value in enumerate(values)
    ]


def test_a_figure_of_an_arena_run_has_four_panels_and_text_that_stays_text() -> None:
    from fedmoe.monitor.charts.run_plot import run_figure
    from fedmoe.monitor.picture import picture

    curves = arena_plot("first", series_of(policies=3, iterations=20))
    drawn = picture(run_figure("arena", curves), "svg")
    texts, ids = texts_and_curves(drawn)
    assert {"Reward", "Movement since sampling", "Entropy", "iteration", "solver", "checker", "planner"} <= set(texts)
    assert any(text.startswith("Held-out score against") for text in texts)
    assert len(ids) == 12
    assert sum(name.startswith("curve-score-") for name in ids) == 3
    assert not any("SAMPLE" in text for text in texts)
    # The same figure is the same file, so that a diff of a paper's figures says what changed.
    assert picture(run_figure("arena", curves), "svg") == drawn
    assert picture(run_figure("arena", curves), "pdf").startswith(b"%PDF")
    assert picture(run_figure("arena", curves), "png").startswith(b"\x89PNG")


def test_two_runs_are_told_apart_and_sample_data_are_marked() -> None:
    from fedmoe.monitor.charts.run_plot import run_figure
    from fedmoe.monitor.picture import picture

    curves = [*arena_plot("first", series_of(2, 8)), *arena_plot("second", series_of(2, 9))]
    texts, ids = texts_and_curves(picture(run_figure("arena", curves, sample=True), "svg"))
    assert {"first: solver", "second: solver", "second: checker"} <= set(texts)
    assert len(ids) == 16
    assert any(text.startswith("SAMPLE DATA") for text in texts)


def test_the_losses_of_a_federation_lie_over_its_running_time() -> None:
    records: list[Record] = [
        *losses("w1", "python", "held_out", [3.0, 2.5, 2.0]),
        *losses("w1", "python", "step", [3.1, 3.0, 2.9, 2.8, 2.7, 2.6, 2.5, 2.4]),
        # A day later, with a loss that is no number.
        *losses("w2", "sql", "held_out", [4.0, float("nan"), 3.0], start=90_000.0),
        {"at": 1005.0, "kind": "push", "worker": "w1", "expert": "python", "loss": 1.0},
    ]
    held_out, sql, training = federation_plot("run", records)
    assert (held_out.measure, held_out.name, training.measure) == ("held_out_loss", "python", "training_loss")
    np.testing.assert_array_equal(held_out.x, [0, 10, 20])
    np.testing.assert_array_equal(held_out.y, [3.0, 2.5, 2.0])
    np.testing.assert_array_equal(sql.x, [70, 90])
    assert training.smooth is not None
    # A few points show themselves.
    (short,) = federation_plot("run", losses("w1", "python", "step", [3.1, 3.0]))
    assert short.smooth is None
    both = federation_plot("run", [*records, *losses("w3", "python", "held_out", [3.0])])
    assert [curve.name for curve in both if curve.measure == "held_out_loss"] == ["python, w1", "python, w3", "sql"]


def test_the_table_has_a_row_a_point() -> None:
    curves = arena_plot("first", series_of(2, 8))
    rows = list(csv.DictReader(io.StringIO(csv_table("arena", curves))))
    assert len(rows) == sum(len(curve.x) for curve in curves)
    score = next(curve for curve in curves if curve.measure == "score")
    row = next(row for row in rows if row["measure"] == "score")
    assert score.low is not None
    assert (row["run"], row["series"], row["against"]) == ("first", score.name, score.against)
    assert [float(row[name]) for name in ("iteration", "value", "low")] == pytest.approx(
        [score.x[0], score.y[0], score.low[0]]
    )
    assert row["smoothed"] == ""
    assert all(row["smoothed"] for row in rows if row["measure"] == "kl")
    assert csv_table("federation", []).splitlines() == ["run,measure,series,against,seconds,value,smoothed,low,high"]
