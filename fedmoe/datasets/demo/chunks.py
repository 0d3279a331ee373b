"""Documents cut into chunks of about a thousand characters, at places where a person would cut."""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator

TARGET_CHARS = 1000
LARGEST_CHARS = 2000
SMALLEST_CHARS = 200
FUNCTION_CHARS = (200, 4000)

_DOLLAR_QUOTE = re.compile(r"\$[A-Za-z_]*\$")
_BOOK_STARTS = re.compile(r"^\*\*\* ?START OF .*$", re.MULTILINE)
_BOOK_ENDS = re.compile(r"^\*\*\* ?END OF .*$", re.MULTILINE)
_COPY_DATA = re.compile(r"^\s*copy\b.*\bfrom\s+stdin\b", re.IGNORECASE)


def prose_chunks(text: str) -> list[str]:
    """Whole paragraphs, joined up to `TARGET_CHARS`."""
    return _join(re.split(r"(?<=\n)(?=\n*\S)(?<=\n\n)", text))


def book_chunks(text: str) -> list[str]:
    """The paragraphs of a Project Gutenberg file's book, each on one line, joined up to `TARGET_CHARS`.

    What stands before and after the book (about the file, its licence) is left out; a text without the marks is a book.
    """
    after_start = _BOOK_STARTS.split(text, maxsplit=1)[-1]
    book = _BOOK_ENDS.split(after_start, maxsplit=1)[0]
    paragraphs = (" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", book))
    return prose_chunks("\n\n".join(filter(None, paragraphs)))


def sql_chunks(text: str) -> list[str]:
    """Whole statements, joined up to `TARGET_CHARS`; inline COPY data and chunks of mere numbers are left out."""
    return [chunk for chunk in _join(_statements(text)) if not _mostly_numbers(chunk)]


def python_functions(source: str) -> list[str]:
    """The functions and methods that have a docstring, each whole with its decorators, dedented; none if not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the source are no concern of ours
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return []
    lines = source.splitlines(keepends=True)
    found = [_source(node, lines) for node in _outer_functions(tree.body) if ast.get_docstring(node)]
    shortest, longest = FUNCTION_CHARS
    return [text for text in found if shortest <= len(text) <= longest]


def _outer_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _outer_functions(node.body)


def _source(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).strip()


def _statements(text: str) -> Iterator[str]:
    """Runs of lines that end with a `;` outside a dollar quote; the pieces join to the text without COPY data."""
    lines: list[str] = []
    quote: str | None = None
    in_data = False
    for line in text.splitlines(keepends=True):
        if in_data:
            in_data = not line.startswith("\\.")
            continue
        lines.append(line)
        quote = _quote_after(line, quote)
        if quote is None and line.split("--")[0].rstrip().endswith(";"):
            in_data = bool(_COPY_DATA.match(line))
            yield "".join(lines)
            lines = []
    yield "".join(lines)


def _quote_after(line: str, quote: str | None) -> str | None:
    for mark in _DOLLAR_QUOTE.findall(line):
        if quote is None:
            quote = mark
        elif mark == quote:
            quote = None
    return quote


def _join(units: Iterable[str]) -> list[str]:
    """Units in order, joined until the next would pass `TARGET_CHARS`; chunks under `SMALLEST_CHARS` are left out."""
    chunks: list[str] = []
    open_chunk = ""
    for unit in units:
        for piece in _pieces(unit):
            if open_chunk and len(open_chunk) + len(piece) > TARGET_CHARS:
                chunks.append(open_chunk)
                open_chunk = ""
            open_chunk += piece
    chunks.append(open_chunk)
    stripped = [chunk.strip("\n").rstrip() for chunk in chunks]
    return [chunk for chunk in stripped if len(chunk) >= SMALLEST_CHARS]


def _pieces(unit: str) -> Iterator[str]:
    """The unit, or its lines if it is larger than `LARGEST_CHARS`; a line that is larger still is left out."""
    if len(unit) <= LARGEST_CHARS:
        yield unit
    else:
        yield from (line for line in unit.splitlines(keepends=True) if len(line) <= LARGEST_CHARS)


def _mostly_numbers(text: str) -> bool:
    letters = sum(char.isalpha() for char in text)
    digits = sum(char.isdigit() for char in text)
    return digits > letters
