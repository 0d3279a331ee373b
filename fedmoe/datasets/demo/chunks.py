"""Cuts documents into chunks of about a thousand characters, at natural boundaries."""

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
    chunks = _join(_statements(text))
    return [chunk for chunk in chunks if sum(map(str.isdigit, chunk)) <= sum(map(str.isalpha, chunk))]


def python_functions(source: str) -> list[str]:
    """The functions and methods that have a docstring, each whole with its decorators, dedented; none if not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the source are no concern of ours
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return []
    lines = source.splitlines(keepends=True)
    shortest, longest = FUNCTION_CHARS
    functions = []
    for node in _outer_functions(tree.body):
        if ast.get_docstring(node):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            functions.append(textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).strip())
    return [text for text in functions if shortest <= len(text) <= longest]


def _outer_functions(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef):
            yield from _outer_functions(node.body)


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
        for mark in _DOLLAR_QUOTE.findall(line):
            quote = mark if quote is None else None if mark == quote else quote
        if quote is None and line.split("--")[0].rstrip().endswith(";"):
            in_data = bool(_COPY_DATA.match(line))
            yield "".join(lines)
            lines = []
    yield "".join(lines)


def _join(units: Iterable[str]) -> list[str]:
    """Units in order, joined until the next would pass `TARGET_CHARS`; chunks under `SMALLEST_CHARS` are left out."""
    chunks: list[str] = []
    open_chunk = ""
    for unit in units:
        # Of a unit that is too large its lines; a line that is larger still is left out.
        pieces = [unit] if len(unit) <= LARGEST_CHARS else unit.splitlines(keepends=True)
        for piece in pieces:
            if len(piece) > LARGEST_CHARS:
                continue
            if open_chunk and len(open_chunk) + len(piece) > TARGET_CHARS:
                chunks.append(open_chunk)
                open_chunk = ""
            open_chunk += piece
    chunks.append(open_chunk)
    stripped = [chunk.strip("\n").rstrip() for chunk in chunks]
    return [chunk for chunk in stripped if len(chunk) >= SMALLEST_CHARS]
