"""`fedmoe evaluator` and what the gate shows on the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Outcome
from live import LiveServer, listening, open_house
from structlog.testing import capture_logs

from fedmoe.coordinator import Aggregation

Run = Callable[..., Outcome]


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    file = tmp_path / "held_out.jsonl"
    file.write_text(
        "".join(json.dumps({"text": f"row {number} of text nobody trains on"}) + "\n" for number in range(20))
    )
    return file


def arguments(url: str, held_out: Path) -> list[str]:
    who = ["--evaluator-id", "E1", "--expert", "python", "--held-out", str(held_out), "--base-model", "tiny"]
    return ["evaluator", "--coordinator-url", url, *who]


def test_a_coordinator_without_a_gate_is_told_at_once(fedmoe: Run, server: LiveServer, held_out: Path) -> None:
    done = fedmoe(*arguments(server.url, held_out))
    assert done.status == 1
    assert "--evaluation-gate" in done.err
    assert "[gate_disabled]" in done.err


def test_a_file_that_is_not_there_is_told_before_anything_is_asked(fedmoe: Run, tmp_path: Path) -> None:
    done = fedmoe(*arguments("http://127.0.0.1:9", tmp_path / "none.jsonl"))
    assert done.status == 1
    assert "none.jsonl" in done.err


def test_values_out_of_range_are_usage_errors(fedmoe: Run, held_out: Path) -> None:
    for option, value in (("--held-out-blocks", "0"), ("--poll-interval", "0"), ("--expert", "../x")):
        done = fedmoe(*arguments("http://127.0.0.1:9", held_out), option, value)
        assert (done.status, option in done.err) == (2, True)


def test_a_gate_needs_a_gateway(fedmoe: Run, tmp_path: Path) -> None:
    done = fedmoe("coordinator", "--evaluation-gate", "--no-enable-gateway", "--state-dir", str(tmp_path / "state"))
    assert done.status == 2
    assert "--no-enable-gateway" in done.err


def test_a_gateway_that_is_not_out_yet_is_told_with_the_reason(fedmoe: Run, tmp_path: Path) -> None:
    with capture_logs(), open_house(tmp_path, Aggregation(evaluation_gate=True)) as house:
        house.register("python")
        with listening(house.app) as server:
            done = fedmoe("gateway", "info", "--coordinator-url", server.url)
            assert done.status == 1
            assert "no evaluator has asked" in done.err
            listed = fedmoe("experts", "list", "--coordinator-url", server.url)
            assert (listed.status, "python" in listed.out) == (0, True)
