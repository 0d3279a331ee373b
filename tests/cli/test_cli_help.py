"""Help is complete, and costs little."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from command import Command, Outcome, commands, run_code, run_command, run_script

# What a coordinator or a person who reads the help has no use for.
HEAVY = (
    *("torch", "transformers", "tokenizers", "peft", "matplotlib", "pyarrow", "fastapi", "uvicorn", "sqlalchemy"),
    *("numpy", "pydantic", "httpx2", "structlog", "rich"),
)
NAMES = [name for name, _ in commands() if name.startswith("fedmoe")]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_answers_help(name: str, fedmoe: Callable[..., Outcome]) -> None:
    outcome = fedmoe(*name.split()[1:], "--help")
    assert outcome.status == 0
    assert "Usage:" in outcome.out
    assert outcome.err == ""


@pytest.mark.parametrize(("name", "command"), [*commands()], ids=lambda value: value if isinstance(value, str) else "")
def test_at_80_columns_no_name_and_no_sentence_is_cut_and_every_option_has_a_text(
    name: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = command.make_context(name, [], resilient_parsing=True).get_help()
    words = {word.strip("[];,") for word in text.split()}
    for parameter in command.params:
        assert parameter.help, f"{parameter.name} has no text"
        if parameter.param_type_name == "option":
            assert {*parameter.opts, *parameter.secondary_opts} <= words
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= 80
    one_line = " ".join(text.split())
    for word, inner in getattr(command, "commands", {}).items():
        sentence = inner.get_short_help_str(10_000)
        assert f"{word} {' '.join(sentence.split())}" in one_line
        assert not sentence.endswith("...")


@pytest.mark.parametrize("name", ["worker", "join", "evaluator", "gateway serve", "gateway generate"])
def test_a_default_that_depends_on_the_device_is_said_in_words(name: str, fedmoe: Callable[..., Outcome]) -> None:
    said = " ".join(fedmoe(*name.split(), "--help").out.split())
    assert "auto: the first of CUDA, MPS and CPU that is there. [default: auto]" in said


@pytest.mark.parametrize(
    ("words", "offered"),
    [("fedmoe gat", ["gateway"]), ("fedmoe gateway ser", ["serve"]), ("fedmoe worker --lora-al", ["--lora-alpha"])],
)
def test_the_shell_completes_what_is_begun(words: str, offered: list[str]) -> None:
    """As the script that `fedmoe --show-completion` prints asks for it."""
    asked = {"_FEDMOE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    outcome = run_command(environment=asked)
    assert (outcome.status, outcome.out.split(), outcome.err) == (0, offered, "")


def test_the_completion_of_a_shell_is_shown() -> None:
    outcome = run_command(
        "--show-completion", "bash", environment={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert outcome.status == 0
    assert "_FEDMOE_COMPLETE=complete_bash" in outcome.out


def test_help_says_the_default_of_an_option(fedmoe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
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
    # A quarter of a second alone; this bound only catches a heavy import that comes under another name.
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("group", ["", "gateway", "data", "token"])
def test_a_group_alone_shows_its_help_once(group: str, fedmoe: Callable[..., Outcome]) -> None:
    outcome = fedmoe(*filter(None, [group]))
    assert outcome.status == 2
    assert (outcome.out + outcome.err).count("Usage:") == 1


def test_the_version_is_printed(fedmoe: Callable[..., Outcome]) -> None:
    from fedmoe import __version__

    assert fedmoe("--version").out.strip() == __version__
