"""Help is complete, and costs little."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from command import Outcome, commands, run_code, run_script

# What a coordinator or a person who reads the help has no use for.
HEAVY = ("torch", "transformers", "tokenizers", "peft", "matplotlib", "pyarrow", "fastapi", "uvicorn", "sqlalchemy")
NAMES = [name for name, _ in commands() if name.startswith("fedmoe")]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_answers_help(name: str, fedmoe: Callable[..., Outcome]) -> None:
    outcome = fedmoe(*name.split()[1:], "--help")
    assert outcome.status == 0
    assert "Usage:" in outcome.out
    assert outcome.err == ""


def test_help_says_the_default_of_an_option(fedmoe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    """Square brackets are markup to what draws the help, unless they are escaped."""
    monkeypatch.setenv("COLUMNS", "200")
    assert "[default: 5000]" in " ".join(fedmoe("coordinator", "--help").out.split())
    assert "[default: 1e-3]" in " ".join(fedmoe("worker", "--help").out.split())


@pytest.mark.parametrize("script", ["run_coordinator.py", "run_worker.py", "get_gateway_model.py"])
def test_the_specified_scripts_answer_help(script: str) -> None:
    """A1, A2, A3."""
    outcome = run_script(script, "--help")
    assert outcome.status == 0
    assert script in outcome.out


def test_help_loads_nothing_heavy_and_is_quick() -> None:
    code = f"""
import sys
from fedmoe.cli import main
try:
    main(["--help"])
except SystemExit as left:
    assert not left.code
print(sorted(sys.modules.keys() & set({HEAVY!r})), file=sys.stderr)
"""
    started = time.monotonic()
    outcome = run_code(code)
    assert outcome.err.strip() == "[]"
    # About half a second alone; this bound only catches a heavy import that comes under another name.
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("group", ["", "gateway", "data", "token"])
def test_a_group_alone_shows_its_help_once(group: str, fedmoe: Callable[..., Outcome]) -> None:
    outcome = fedmoe(*filter(None, [group]))
    assert outcome.status == 2
    assert (outcome.out + outcome.err).count("Usage:") == 1


def test_the_version_is_printed(fedmoe: Callable[..., Outcome]) -> None:
    from fedmoe import __version__

    assert fedmoe("--version").out.strip() == __version__
