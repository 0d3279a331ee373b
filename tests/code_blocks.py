"""Code blocks of documents, and the command lines in them, judged by the programs that they name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import typer

from fedmoe.cli.commands import app
from fedmoe.cli.gateway import get_gateway_model

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "README.zh.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: The specification's scripts, and the commands that they are.
SCRIPTS = {"run_coordinator.py": "coordinator", "run_worker.py": "worker", "get_gateway_model.py": ""}


@dataclass(frozen=True)
class Block:
    """A fenced block: its document, the line of its fence, its language, its text."""

    document: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"


def blocks(language: str | None = None) -> list[Block]:
    """All blocks, or those of a language."""
    found = [block for document in DOCUMENTS for block in _blocks_of(document)]
    return [block for block in found if language in (None, block.language)]


def _blocks_of(document: Path) -> Iterator[Block]:
    text = document.read_text()
    for match in re.finditer(r"^( *)```(\w*)\n(.*?)^ *```$", text, re.MULTILINE | re.DOTALL):
        yield Block(document, text.count("\n", 0, match.start()) + 1, match[2], match[3])


def command_lines(block: Block) -> Iterator[list[str]]:
    """The words of every command of a block of shell, without comments and without where output goes."""
    for line in block.text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        words: list[str] = []
        for word in chain(takewhile(lambda word: not word.startswith("#"), lexer), ";"):
            if not re.fullmatch(r"[;&|]+", word):
                words.append(word)
            elif words:
                yield _without_redirection(words)
                words = []


def _without_redirection(words: list[str]) -> list[str]:
    cut = next((number for number, word in enumerate(words) if re.fullmatch(r"[<>&]+", word)), len(words))
    words = words[:cut]
    return words[1:] if words[:1] == ["nohup"] else words


def own_command(words: list[str]) -> tuple[str, list[str]] | None:
    """A command of ours, by its name, and what it is given; None: another program."""
    if words[0] in ("python", "torchrun"):
        script = next((number for number, word in enumerate(words) if word in SCRIPTS), None)
        if script is None:
            return None
        name = f"fedmoe {SCRIPTS[words[script]]}".strip() if SCRIPTS[words[script]] else words[script]
        return name, words[script + 1 :]
    if words[0] != "fedmoe":
        return None
    command, rest = tree(), words[1:]
    name = "fedmoe"
    while rest and rest[0] in getattr(command, "commands", {}):
        command, name = command.commands[rest[0]], f"{name} {rest[0]}"
        rest = rest[1:]
    return name, rest


@cache
def tree() -> Any:
    """All commands."""
    return typer.main.get_command(app)


@cache
def command_named(name: str) -> Any:
    """A command by its whole name."""
    if name == "get_gateway_model.py":
        single = typer.Typer(add_completion=False)
        single.command()(get_gateway_model)
        return typer.main.get_command(single)
    command = tree()
    for word in name.split()[1:]:
        command = command.commands[word]
    return command


def parse(name: str, arguments: list[str]) -> None:
    """Raises what the command would if it were called with these words: unknown options, missing or wrong values."""
    if arguments and arguments[-1] == "...":
        # The document says that more is to be written here: what is there has to be known.
        options = {option for item in command_named(name).params for option in (*item.opts, *item.secondary_opts)}
        unknown = {word for word in arguments if word.startswith("--")} - options
        assert not unknown, f"{name}: {unknown}"
        return
    command = command_named(name)
    command.make_context(name, list(arguments))
