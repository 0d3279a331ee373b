"""The live view shows what records say, on a terminal and where there is none (E23)."""

from __future__ import annotations

import io
import math

import pytest
from arena_records import real
from rich.console import Console

from fedmoe.monitor.sample_records import sample_records
from fedmoe.monitor.terminal import TerminalView, sparkline
from fedmoe.runtime.records import Record


def shown(records: list[Record], terminal: bool, iterations: int = 5) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=140, height=60, color_system=None)
    with TerminalView(console, iterations) as view:
        for record in records:
            view.write(record)
    return out.getvalue()


def test_a_row_of_blocks_follows_the_numbers() -> None:
    assert sparkline([0.0, 1.0, 0.5, math.nan]) == "▁█▅"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline([float(i) for i in range(100)], width=10)) == 10


def test_a_terminal_shows_progress_policies_machine_and_decisions() -> None:
    """E23."""
    records = sample_records(3, 40)
    last = {str(record["policy"]): record for record in records if record["kind"] == "policy"}
    text = shown(records, terminal=True, iterations=80)
    picture = text[text.rindex("SAMPLE DATA") :]
    assert "40 of 80 iterations" in picture
    assert "min left" in picture
    for policy, record in last.items():
        assert policy in picture
        assert f"{record['reward']:.3f}" in picture
    assert "█" in picture
    assert "CPU" in picture
    assert "of 32" in picture
    assert "mode cooperative" in picture or "→ cooperative" in picture


def test_elsewhere_it_is_a_line_an_iteration() -> None:
    records = real(sample_records(2, 5))
    lines = shown(records, terminal=False, iterations=5).splitlines()
    assert lines[0].startswith("task sample:arithmetic")
    through = [line for line in lines if line.startswith("iteration ")]
    assert [line.split()[1] for line in through] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    assert all("solver reward" in line and "tokens/s" in line for line in through)
    assert "\x1b" not in "".join(lines)
    assert any("learning rate" in line for line in lines)


def test_sample_data_is_marked_everywhere() -> None:
    records = sample_records(1, 2)
    for terminal in (True, False):
        assert "SAMPLE DATA" in shown(records, terminal)
        assert "SAMPLE DATA" not in shown(real(records), terminal)


def test_missing_numbers_are_dashes_and_markup_is_text() -> None:
    record: Record = {"at": 1.0, "kind": "policy", "policy": "[red]x", "iteration": 0, "reward": None, "mode": "[b]m"}
    system: Record = {"at": 1.0, "kind": "system", "cpu_percent": 3.0, "gpu_percent": None}
    text = shown([record, system], terminal=True)
    assert "[red]x" in text
    assert "[b]m" in text
    assert "–" in text
    assert "no GPU" in text


HELD_OUT: Record = {
    "kind": "evaluation",
    "policy": "a",
    "opponent": "base",
    "iteration": 3,
    "at": 1.0,
    "questions": 18,
    "few": True,
    "score": 0.5,
    "low": 0.4,
    "high": 0.6,
    "base_score": 0.3,
}
LEADER: Record = {
    "kind": "leader",
    "policy": "a",
    "rival": "b",
    "iteration": 3,
    "at": 1.0,
    "apart": False,
    "lead": 0.1,
    "lead_low": -0.02,
    "lead_high": 0.22,
}
SKIPPED: Record = {"kind": "skipped", "at": 1.0, "iteration": 3, "where": "training", "episodes": 4, "reason": "a bug"}


@pytest.mark.parametrize("terminal", [True, False])
def test_comparisons_say_what_they_rest_on_and_skipped_episodes_why(terminal: bool) -> None:
    rival: Record = {**HELD_OUT, "opponent": "b@3", "win_rate": 0.55, "win_low": 0.45, "win_high": 0.65}
    assert "a held out wins 0.55 [0.45, 0.65] of its games against b@3, 18" in shown([rival], terminal)
    text = shown([HELD_OUT, LEADER, SKIPPED], terminal)
    assert "a held out 0.50 [0.40, 0.60], base 0.30, 18 different questions only: too few" in text
    assert "the best policies are not told apart: a is ahead of b by 0.10 [-0.02, 0.22]" in text
    assert "4 episodes of training skipped: a bug" in text
    assert "best policy a, ahead of b" in shown([{**LEADER, "apart": True}], terminal)
