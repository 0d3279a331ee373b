"""`fedmoe arena watch`: what a run has recorded and what it records while it is watched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedmoe.cli.arena_watch import follow
from fedmoe.cli.output import CommandError
from fedmoe.monitor.sample_records import sample_records

Captured = pytest.CaptureFixture[str]


def test_a_run_is_shown_from_its_beginning_and_as_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(record) + "\n" for record in sample_records(2, 4)]
    file, half = tmp_path / "metrics.jsonl", len(lines) // 2
    looks = []

    def ended() -> bool:
        looks.append(capsys.readouterr().out)
        if len(looks) == 1:  # nothing is there yet
            file.write_text("".join(lines[:half]) + lines[half][:9])
        elif len(looks) == 2:
            file.write_text("".join(lines))
        return len(looks) == 3

    follow(tmp_path, ended)
    assert looks[0] == ""
    assert "sample:arithmetic" in looks[1]
    assert "iteration 1/4" in looks[1]
    assert "iteration 1/4" not in looks[2]
    assert "iteration 4/4" in looks[2]


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="pass the folder of a run"):
        follow(tmp_path / "nowhere", lambda: True)
