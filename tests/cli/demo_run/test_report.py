"""The demonstration's report says what the losses say."""

from __future__ import annotations

import json

import pytest

from fedmoe.cli.demo_run.plan import GENERAL
from fedmoe.cli.demo_run.report import GATEWAY, report_json, report_markdown, report_table, results
from fedmoe.gateway.evaluate import BASE, LossMatrix

LOSSES = {
    BASE: {"python": 2.0, "sql": 3.0, "docs": 4.0, GENERAL: 3.5},
    "python_expert": {"python": 1.6, "sql": 2.9, "docs": 3.9, GENERAL: 3.61},
    "sql_expert": {"python": 1.9, "sql": 2.4, "docs": 4.1, GENERAL: 3.62},
    "docs_expert": {"python": 2.1, "sql": 3.0, "docs": 3.0, GENERAL: 3.4},
    GATEWAY: {"python": 1.8, "sql": 2.7, "docs": 3.25, GENERAL: 3.57},
}
MATRIX = LossMatrix(LOSSES, {"python": 10, "sql": 20, "docs": 30, GENERAL: 40})


def test_every_domain_shows_base_own_expert_the_others_and_the_gateway() -> None:
    found, _ = results(MATRIX)
    assert list(found) == ["python", "sql", "docs"]
    assert (found["sql"].base, found["sql"].expert, found["sql"].gateway) == (3.0, 2.4, 2.7)
    assert found["sql"].others == {"python_expert": 2.9, "docs_expert": 3.0}
    assert found["docs"].held_out_tokens == 30


def test_improvement_and_gain_kept_are_shares_of_the_base_and_of_the_experts_gain() -> None:
    found, _ = results(MATRIX)
    assert found["python"].improvement == pytest.approx(0.2)
    assert [found[name].gain_kept for name in found] == pytest.approx([0.5, 0.5, 0.75])


def test_the_json_has_the_promised_keys() -> None:
    report = json.loads(report_json(*results(MATRIX), {"steps_per_worker": 60}))
    assert report["steps_per_worker"] == 60
    for name, losses in report["domains"].items():
        assert {"base", "expert", "gateway"} <= losses.keys()
        assert losses["base"] == LOSSES[BASE][name]


def test_the_markdown_shows_every_number_of_the_table() -> None:
    text = report_markdown(*results(MATRIX), {"strategy": "weighted_average"})
    for shown in ("2.000", "1.600", "-20.0 %", "50 %", "3.250", "python 1.600"[7:], "sql 1.900", "weighted_average"):
        assert shown in text


def test_text_that_nobody_trained_on_has_a_row_of_its_own() -> None:
    domains, found = results(MATRIX)
    assert (found.base, found.gateway, found.held_out_tokens) == (3.5, 3.57, 40)
    assert found.experts == {"python_expert": 3.61, "sql_expert": 3.62, "docs_expert": 3.4}
    assert found.change == pytest.approx(0.02)
    report = json.loads(report_json(domains, found, {}))
    assert report[GENERAL]["experts"] == found.experts
    assert GENERAL not in report["domains"]
    text = report_markdown(domains, found, {})
    assert "| general | 3.500 |  |  | python 3.610, sql 3.620, docs 3.400 | 3.570 | (+2.0 %) |" in text
    assert report_table(domains, found).row_count == 4


def test_an_expert_that_gained_nothing_leaves_a_gap_in_the_report_and_no_traceback() -> None:
    same = {name: {**row, "sql": 3.0} for name, row in LOSSES.items()}
    matrix = LossMatrix(same, MATRIX.tokens)
    report = json.loads(report_json(*results(matrix), {}))
    assert report["domains"]["sql"]["gain_kept"] is None
