"""Domains to route between: the demonstration's three, and nine cut from packages that are installed for the tests.

Nothing is downloaded for the nine. Some are close on purpose: library code, stubs, tests and Cython; C, C++ and CUDA;
manuals, package descriptions and doctests. Two more, `RESERVED`, were used for no decision, only to report.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TypeVar

from fedmoe.datasets.demo.chunks import prose_chunks
from fedmoe.datasets.demo.domains import DOMAINS, RECIPES, TEST, TRAIN, Recipe, build_domains, split_chunks
from fedmoe.datasets.demo.sources import Document, Package

Item = TypeVar("Item")

_MOST_BYTES = 300_000
_MOST_FILES = 150


@dataclass(frozen=True)
class PromptDomain:
    """Texts to learn a domain from and texts of other files to test with."""

    name: str
    train: Sequence[str]
    test: Sequence[str]


def _ends(*endings: str, inside: str = "") -> Callable[[str], bool]:
    return lambda path: path.endswith(endings) and inside in path


#: Domain -> which files of the installed packages it is made of, from easy to hard.
INSTALLED: dict[str, Callable[[str], bool]] = {
    "cpp": _ends(".h", ".hpp", ".cc", ".cpp", inside="torch/include/"),
    "c": _ends(".c"),
    "stubs": _ends(".pyi", inside="mypy/typeshed/"),
    "readmes": _ends(".dist-info/METADATA"),
    "cython": _ends(".pyx", ".pxd", ".pxi"),
    "doctests": _ends(".doctest"),
    "tests": lambda path: "sympy/" in path and "/tests/test_" in path and path.endswith(".py"),
    "cuda": _ends(".cuh"),
    "cmake": _ends(".cmake"),
}
NAMES = (*DOMAINS, *INSTALLED)


def _of_django(accepts: Callable[[PurePosixPath], bool]) -> Recipe:
    source = RECIPES["docs"].source
    assert isinstance(source, Package)
    return Recipe(replace(source, accepts=accepts), prose_chunks)


#: Other files of the archive that `docs` is from.
RESERVED: dict[str, Recipe] = {
    "javascript": _of_django(lambda path: path.suffix == ".js" and ".min" not in path.suffixes),
    "templates": _of_django(lambda path: path.suffix == ".html"),
}


def load_domains(built: Path, names: Sequence[str], train: int, test: int) -> list[PromptDomain]:
    """The named domains with at most so many texts; `built` is where `fedmoe data` wrote the first three."""
    build_domains(built, [name for name in names if name in RESERVED], recipes=RESERVED)
    return [_installed(name, train, test) if name in INSTALLED else _built(built / name, train, test) for name in names]


def _built(folder: Path, train: int, test: int) -> PromptDomain:
    texts = [
        [str(json.loads(line)["text"]) for line in (folder / file).read_text("utf-8").splitlines()]
        for file in (TRAIN, TEST)
    ]
    return PromptDomain(folder.name, _spaced(texts[0], train), _spaced(texts[1], test))


def installed_documents(name: str) -> list[Document]:
    """The files that a domain of `INSTALLED` is made of, at most 150 of them."""
    root = Path(sysconfig.get_path("purelib"))
    paths = [path for path in sorted(root.rglob("*")) if INSTALLED[name](path.relative_to(root).as_posix())]
    chosen = [path for path in paths if path.is_file() and path.stat().st_size < _MOST_BYTES]
    if not chosen:
        raise SystemExit(f"domain {name}: nothing in {root}; install the project with its dev extra")
    return [
        Document(path.relative_to(root).as_posix(), path.read_text("utf-8", errors="replace"))
        for path in _spaced(chosen, _MOST_FILES)
    ]


def _installed(name: str, train: int, test: int) -> PromptDomain:
    rows, held_out, _ = split_chunks(installed_documents(name), prose_chunks)
    return PromptDomain(name, _spaced([row.text for row in rows], train), _spaced([row.text for row in held_out], test))


def _spaced(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` items, evenly spread: neighbours come from one file."""
    if len(items) <= count:
        return list(items)
    return [items[place * len(items) // count] for place in range(count)]
