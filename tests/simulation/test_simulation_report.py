"""What the report makes of counts and curves."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from simulated import configured, run

from fedmoe.simulation.config import SimulationConfig
from fedmoe.simulation.report import make_report
from fedmoe.simulation.report_text import markdown
from fedmoe.simulation.run import SchemeRun
from fedmoe.simulation.tally import CurvePoint, FleetTally

CONFIG = SimulationConfig.model_validate(
    {
        "seconds": 90.0,
        "work": {"kind": "training"},
        "fleet": {"workers": 4},
        "schemes": [{"name": "rounds", "kind": "rounds"}, {"name": "own", "kind": "asynchronous"}],
        "report": {"target": 0.9, "budget_megabytes": 5.0, "robustness": ["rounds", "own"]},
    }
)


def made(place: int, losses: list[float], ideal: bool = False) -> SchemeRun:
    """A run whose loss was measured every 30 s, with 2 MB up and 1 MB down between."""
    points = [CurvePoint(30.0 * at, loss, 2_000_000 * at, 1_000_000 * at) for at, loss in enumerate(losses)]
    tally = FleetTally(accepted=Counter({0: 3, 1: 1}), staleness=Counter({0: 1, 2: 2, 9: 1}), curve=points)
    tally.bytes_up, tally.bytes_down = points[-1].bytes_up, points[-1].bytes_down
    return SchemeRun(CONFIG.schemes[place], ideal, 4, tally, {"expert-0": 4}, {"expert-0": "d"}, 0)


RUNS = [
    made(0, [6.0, 5.0, 4.0, 3.5]),
    made(1, [6.0, 3.6, 3.0, 3.1]),
    made(0, [6.0, 3.0, 2.0, 1.0], ideal=True),
    made(1, [6.0, 5.0, 3.5, 2.5], ideal=True),
]


@pytest.fixture(scope="module")
def report() -> Any:
    return make_report(CONFIG, 8192, RUNS)


def test_cost_to_target_is_when_the_loss_is_first_there(report: Any) -> None:
    assert report["target_loss"] == pytest.approx(6.0 - 0.9 * 2.5)
    rounds, own = (row["cost_to_target"] for row in report["comparison"])
    assert (rounds["seconds"], rounds["megabytes_up"], rounds["seconds_of_baseline"]) == (90.0, 6.0, 1.0)
    assert (own["seconds"], own["megabytes_down"]) == (30.0, 1.0)
    assert own["seconds_of_baseline"] == pytest.approx(1 / 3)


def test_a_target_that_is_never_reached_is_said_to_be_so() -> None:
    report: Any = make_report(CONFIG, 8192, [RUNS[0], made(1, [6.0, 5.5])])
    assert set(report["comparison"][1]["cost_to_target"].values()) == {None}
    assert "not reached" in markdown(report)


def test_quality_under_budget_is_the_lowest_loss_within_it(report: Any) -> None:
    assert report["budgets"] == {"seconds": 30.0, "megabytes": 5.0}
    rounds, own = report["comparison"]
    assert rounds["quality_under_budget"] == {"seconds": 5.0, "megabytes": 5.0}
    assert own["quality_under_budget"] == {"seconds": 3.6, "megabytes": 3.6}
    assert own["lowest_loss"] == 3.0
    assert own["gain_of_baseline"] == pytest.approx(3.0 / 2.5)


def test_robustness_is_the_gain_beside_that_of_the_ideal_fleet(report: Any) -> None:
    rounds, own = (row["robustness"] for row in report["comparison"])
    assert rounds == {"gain_of_ideal": 0.5, "seconds_to_target_ideal": 30.0}
    assert own["gain_of_ideal"] == pytest.approx(3.0 / 3.5)


def test_counts_are_told_with_their_spread(report: Any) -> None:
    scheme = report["schemes"][0]
    assert scheme["staleness"] == {
        "least": 0,
        "mean": 3.25,
        "median": 2,
        "p90": 9,
        "p99": 9,
        "most": 9,
        "counts": {"0": 1, "2": 2, "9": 1},
    }
    assert scheme["accepted_by_worker"]["least"] == 0
    assert scheme["accepted_by_worker"]["most"] == 3


def test_every_question_has_its_table(report: Any) -> None:
    text = markdown(report)
    for title in ("## Traffic", "## Cost to Target", "## Quality under Budget", "## Robustness"):
        assert title in text
    assert "| own | 30 | 33% | 2.0 | 1.0 |" in text
    assert "| rounds (ideal fleet) |" in text


def test_recorded_deltas_have_no_losses() -> None:
    config = configured(fleet={"workers": 5})
    report: Any = make_report(config, 256, [run(config)])
    assert report["work"] == "recorded"
    assert "comparison" not in report
    assert report["schemes"][0]["curve"] == []
    text = markdown(report)
    assert "nothing was trained" in text
    assert "Cost to Target" not in text
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_disk_is_what_lands_and_a_snapshot_every_fifty_versions() -> None:
    config = configured(fleet={"workers": 12})
    done = run(config)
    report: Any = make_report(config, 256, [done])
    disk = report["schemes"][0]["disk_bytes"]
    assert disk["updates"] == done.tally.bytes_up
    assert done.versions["expert-0"] in range(100, 150)
    assert 2 * 256 * 4 < disk["snapshots"] < 2 * 256 * 4 + 1000
