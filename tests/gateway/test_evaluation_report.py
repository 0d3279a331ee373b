"""What an evaluation prints: every number of the matrix, and nothing JSON cannot hold."""

from __future__ import annotations

import json
import math

import pytest

from fedmoe.gateway.evaluation_report import loss_table, own_experts, report_json, retained_table
from fedmoe.gateway.losses import BASE, LossMatrix
from fedmoe.gateway.retained_gain import retained_gains

BLOCKS = {
    BASE: {"sql": [2.0, 4.0, math.nan], "docs": [3.0, 3.0]},
    "sql_expert": {"sql": [1.0, 3.0, math.nan], "docs": [3.0, 2.9]},
    "gateway": {"sql": [1.5, 3.5, math.nan], "docs": [2.9, 2.9]},
}
MATRIX = LossMatrix.of_blocks(BLOCKS, {"sql": [1000, 1000, 0], "docs": [5, 5]})
FOUND = retained_gains(MATRIX, {"sql": "sql_expert"}, ["gateway"])


def test_a_domains_own_expert_has_its_name_with_or_without_expert() -> None:
    assert own_experts(["sql", "docs", "law"], ["sql_expert", "docs", "docs_expert"]) == {
        "sql": "sql_expert",
        "docs": "docs",
    }


def test_the_loss_table_shows_losses_changes_and_tokens() -> None:
    columns, rows = loss_table(MATRIX)
    assert columns == ("model", "sql", "docs")
    assert rows[0] == (BASE, "3.0000", "3.0000")
    assert rows[2] == ("gateway", "2.5000 (-0.500)", "2.9000 (-0.100)")
    assert rows[-1] == ("tokens", "2,000", "10")


def test_the_retained_table_ends_with_worst_and_mean() -> None:
    columns, rows = retained_table(FOUND)
    assert columns == ("domain", "own expert", "own gain (nats)", "gateway")
    assert rows[0] == ("sql", "sql_expert", "1.000 (1.000 to 1.000)", "50 % (50 to 50)")
    assert [row[0] for row in rows] == ["sql", "worst", "mean"]
    assert rows[1][-1] == "50 % (50 to 50), sql"


def test_an_uncertain_domain_is_marked() -> None:
    none = retained_gains(MATRIX, {"docs": "sql_expert"}, ["gateway"])
    _, rows = retained_table(none)
    assert [row[0] for row in rows] == ["docs ?"]


def test_the_json_is_json_and_holds_what_was_measured() -> None:
    said = json.loads(json.dumps(report_json(MATRIX, FOUND), allow_nan=False))
    assert said["block_losses"]["gateway"]["sql"] == [1.5, 3.5, None]
    half = dict.fromkeys(("value", "low", "high"), 0.5)
    assert said["retained"]["sql"]["kept"]["gateway"] == pytest.approx(half)
    assert said["summary"]["gateway"]["worst_domain"] == "sql"
    assert "retained" not in report_json(MATRIX, None)
