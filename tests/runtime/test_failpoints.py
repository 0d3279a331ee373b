from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest


def run(failpoints: str, reached: list[str]) -> subprocess.CompletedProcess[str]:
    script = """import sys
from fedmoe.runtime import failpoints
for name in sys.argv[1:]:
    print(name, flush=True)
    failpoints.reached(name)
"""
    return subprocess.run(
        [sys.executable, "-c", script, *reached],
        capture_output=True,
        text=True,
        env=os.environ | {"FEDMOE_FAILPOINTS": failpoints},
        check=False,
    )


def test_without_failpoints_nothing_happens() -> None:
    assert run("", ["a", "b"]).returncode == 0


def test_the_process_dies_at_the_named_place_at_the_given_time() -> None:
    done = run("b=2,c=1", ["a", "b", "a", "b", "c"])
    assert (done.returncode, done.stdout.split()) == (-signal.SIGKILL, ["a", "b", "a", "b"])


@pytest.mark.parametrize("text", ["a", "a=", "a=0", "a=x", "a=1,b"])
def test_a_misspelt_failpoint_is_an_error(text: str) -> None:
    assert "FEDMOE_FAILPOINTS: expected NAME=COUNT" in run(text, []).stderr
