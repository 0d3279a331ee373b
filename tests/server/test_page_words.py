"""The page has Chinese words for all that the evaluation gate can say; what it says is read from its source."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from importlib import resources
from types import ModuleType

import pytest

from fedmoe.server.gate import candidates, gate, verdict

#: Modules, and the functions whose texts are read; None for all.
SOURCES: list[tuple[ModuleType, str | None]] = [(verdict, None), (candidates, "decide"), (gate, None)]
_VALUE = "V"
_WORDS = re.compile(r"[a-z]{2,} [a-z-]{2,}")


def parts(tree: ast.AST) -> Iterator[str]:
    """Every part of a sentence, as it is between semicolons, with V for each value; no docstrings, no refusals."""
    if isinstance(tree, ast.Raise) or (isinstance(tree, ast.Expr) and isinstance(tree.value, ast.Constant)):
        return
    if isinstance(tree, ast.JoinedStr):
        texts = [str(piece.value) if isinstance(piece, ast.Constant) else _VALUE for piece in tree.values]
        yield from split("".join(texts))
        for piece in tree.values:
            if isinstance(piece, ast.FormattedValue):
                yield from parts(piece.value)
        return
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield from split(tree.value)
    for child in ast.iter_child_nodes(tree):
        yield from parts(child)


def split(text: str) -> Iterator[str]:
    # A rest that may be empty, `{unjudged}`, stands directly behind a word.
    pieces = [piece.removesuffix(_VALUE) if re.search(rf"\w{_VALUE}$", piece) else piece for piece in text.split("; ")]
    yield from (piece for piece in pieces if _WORDS.search(piece) or piece == f"version {_VALUE}")


def spoken() -> set[str]:
    found = set()
    for module, function in SOURCES:
        trees = ast.parse(inspect.getsource(module)).body
        chosen = [tree for tree in trees if isinstance(tree, ast.FunctionDef | ast.ClassDef)]
        for tree in chosen:
            if function is None or tree.name == function:
                found |= set(parts(tree))
    return found


def sentences() -> list[str]:
    """The English of GATE_SENTENCES in the page's words, in their order."""
    text = resources.files("fedmoe.server.page").joinpath("files", "words.js").read_text("utf-8")
    block = text.split("const GATE_SENTENCES = [")[1].split("\n].map(")[0]
    return re.findall(r'^  \["(.+?)", ".+"\],$', block, re.MULTILINE)


def pattern(english: str) -> re.Pattern[str]:
    return re.compile(re.escape(english).replace(r"\{\}", "(.+?)"))


@pytest.mark.parametrize("part", sorted(spoken()))
def test_the_page_has_chinese_words_for_it(part: str) -> None:
    assert any(pattern(english).fullmatch(part) for english in sentences())


def test_the_page_has_no_words_for_what_nobody_says() -> None:
    said = spoken()
    assert [english for english in sentences() if not any(pattern(english).fullmatch(part) for part in said)] == []
