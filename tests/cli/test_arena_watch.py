"""`fedmoe arena watch`: what a run has recorded and what it records while it is watched."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedmoe.cli.arena_watch import follow
from fedmoe.cli.output import CommandError
from fedmoe.monitor.sample_records import sample_records

#: With the signal of Ctrl-C as a terminal's process has it, whoever runs the tests.
RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from fedmoe.cli import main
main(["arena", "watch", sys.argv[1]])
"""


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


def test_the_command_shows_a_run_until_it_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in sample_records(2, 4)))
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            assert any("iteration 4/4" in line for line in process.stdout), process.stderr.read()
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 0
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
