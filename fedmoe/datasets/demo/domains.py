"""Builds the three demo domains (Python functions, SQL, documentation), each split by file into train and test."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from fedmoe.datasets.demo.chunks import book_chunks, prose_chunks, python_functions, sql_chunks
from fedmoe.datasets.demo.sources import Document, Package, fetch_documents
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.readers.data_source import file_sha256

TEST_PERCENT = 15
MAX_DOMAIN_CHARS = 4_000_000
MAX_OVERLAP = 0.5
COMMON_LINE_CHARS = 20
# Raised whenever the same source would give other rows, so that old folders are built anew.
RECIPE_VERSION = 1
TRAIN, TEST, SOURCES = "train.jsonl", "test.jsonl", "sources.json"


@dataclass(frozen=True)
class Recipe:
    """How a domain is made: from which package (None: Python's library), how it is cut, and whether all is held out."""

    source: Package | None
    chunks: Callable[[str], list[str]]
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class DomainRow:
    """One row of a domain: a piece of text and the file it is from."""

    text: str
    file: str


@dataclass(frozen=True, slots=True)
class SplitSize:
    """Rows, files with at least one row, and characters of one split."""

    rows: int
    files: int
    chars: int


@dataclass(frozen=True)
class DomainSummary:
    """A domain on disk; `built` is False if it was there already."""

    folder: Path
    train: SplitSize
    test: SplitSize
    dropped: int
    built: bool


_SQL_TESTS = PurePosixPath("libpg_query/test/sql/postgres_regress")


def _is_documentation(path: PurePosixPath) -> bool:
    # Release notes repeat each other; the security ones nearly word for word.
    inside = path.parts[:1] == ("docs",) and path.suffix == ".txt"
    return inside and "releases" not in path.parts and path.name != "requirements.txt"


RECIPES: Mapping[str, Recipe] = {
    "python": Recipe(None, python_functions),
    "sql": Recipe(
        Package(
            name="pglast",
            version="8.8",
            archive="pglast-8.8.tar.gz",
            sha256="ff9998ec6bac4f30f84db6b6edb28a0fb03b1eda5c8ad211ab8362f5a08b833b",
            licence="PostgreSQL (regression tests that libpg_query carries)",
            accepts=lambda path: path.parent == _SQL_TESTS and path.suffix == ".sql" and path.stem != "numeric_big",
        ),
        sql_chunks,
    ),
    "docs": Recipe(
        Package(
            name="Django",
            version="5.2.19",
            archive="django-5.2.19.tar.gz",
            sha256="ad03d8abc51dbff95ebf34b27123cf0c26a3b62db7ba0cd520783686362533d1",
            licence="BSD-3-Clause",
            accepts=_is_documentation,
        ),
        prose_chunks,
    ),
}
DOMAINS = tuple(RECIPES)
#: Text of none of the domains, all of it held out: what training on a domain does to everything else shows here.
GENERAL_RECIPES: Mapping[str, Recipe] = {
    "general": Recipe(
        Package(
            name="reasoning-gym",
            version="0.1.25",
            archive="reasoning_gym-0.1.25.tar.gz",
            sha256="932247c760dd23e09fb14d013d29ec4c8804e62846bd50473f6915dc854adad2",
            licence='public domain ("In the Year 2889" by Jules and Michel Verne, 1889)',
            accepts=lambda path: path.name == "in_the_year_2889.txt",
        ),
        book_chunks,
        held_out=True,
    )
}


def build_domains(
    out_dir: Path,
    names: Sequence[str] = DOMAINS,
    progress: Callable[[str], None] | None = None,
    *,
    force: bool = False,
    archives: Path | None = None,
    recipes: Mapping[str, Recipe] = RECIPES,
) -> dict[str, DomainSummary]:
    """Write `<out_dir>/<name>/` with train.jsonl, test.jsonl (`{"text", "file"}`) and sources.json for each name.

    A domain that is complete is left alone, one of an older recipe is replaced; one that was changed since raises
    `DataError` unless `force`. `archives` is a folder with the source archives, for machines without an index.
    """
    unknown = [name for name in names if name not in recipes]
    if unknown:
        raise DataError(f"unknown domains {unknown}; known are {', '.join(recipes)}")
    out_dir.mkdir(parents=True, exist_ok=True)
    say = progress or (lambda message: None)
    return {name: _domain(out_dir / name, recipes[name], say, force, archives) for name in names}


def _domain(
    folder: Path, recipe: Recipe, say: Callable[[str], None], force: bool, archives: Path | None
) -> DomainSummary:
    if not force and (there := _existing(folder)):
        say(f"{folder.name}: already there")
        return there
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        say(f"{folder.name}: reading its source")
        documents, origin = fetch_documents(recipe.source, Path(scratch), archives, say)
        split = held_out_chunks if recipe.held_out else split_chunks
        train, test, dropped = split(documents, recipe.chunks)
        if not test or not (train or recipe.held_out):
            raise DataError(f"{folder.name}: {len(train)} train and {len(test)} test rows; the source is too small")
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        summary = DomainSummary(folder, _size(train), _size(test), dropped, built=True)
        _write(fresh, train, test, summary, origin)
        _replace(folder, fresh, Path(scratch) / "old")
    say(f"{folder.name}: {summary.train.rows:,} train and {summary.test.rows:,} test rows")
    return summary


#: Train rows, test rows, and how many were dropped.
SplitRows = tuple[list[DomainRow], list[DomainRow], int]


def split_chunks(documents: Sequence[Document], cut: Callable[[str], list[str]]) -> SplitRows:
    """Train rows, test rows and how many were dropped as duplicates or for overlap of test with train.

    Files are taken in the order of their path's SHA-1, so that a domain cut at `MAX_DOMAIN_CHARS` is an even sample.
    """
    train: list[DomainRow] = []
    test: list[DomainRow] = []
    chars = 0
    for document in sorted(documents, key=lambda document: _sha1(document.path)):
        chunks = [DomainRow(text, document.path) for text in cut(document.text)]
        chars += sum(len(chunk.text) for chunk in chunks)
        if chars > MAX_DOMAIN_CHARS:
            break
        (test if is_test(document.path) else train).extend(chunks)
    unique_train = _unique(train, set())
    unique_test = _unique(test, {_plain(chunk.text) for chunk in unique_train})
    trained = {line for chunk in unique_train for line in _telling_lines(chunk.text)}
    clean_test = [chunk for chunk in unique_test if _overlap(chunk.text, trained) <= MAX_OVERLAP]
    return unique_train, clean_test, len(train) + len(test) - len(unique_train) - len(clean_test)


def held_out_chunks(documents: Sequence[Document], cut: Callable[[str], list[str]]) -> SplitRows:
    """No train rows, all rows as test rows, and how many were dropped as duplicates."""
    rows = [DomainRow(text, document.path) for document in documents for text in cut(document.text)]
    unique = _unique(rows, set())
    return [], unique, len(rows) - len(unique)


def is_test(path: str) -> bool:
    """Whether a file belongs to the test split: decided by its path alone, the same everywhere."""
    return _sha1(path) % 100 < TEST_PERCENT


def _sha1(path: str) -> int:
    return int(hashlib.sha1(path.encode(), usedforsecurity=False).hexdigest(), 16)


def _unique(chunks: Sequence[DomainRow], seen: set[str]) -> list[DomainRow]:
    unique = []
    for chunk in chunks:
        plain = _plain(chunk.text)
        if plain not in seen:
            seen.add(plain)
            unique.append(chunk)
    return unique


def _plain(text: str) -> str:
    return " ".join(text.split())


def _telling_lines(text: str) -> list[str]:
    """Lines long enough that meeting them again is no chance, without spaces at their ends."""
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= COMMON_LINE_CHARS]


def _overlap(text: str, trained: set[str]) -> float:
    """The share of the text's telling lines, by characters, that is in `trained`."""
    lines = _telling_lines(text)
    return sum(len(line) for line in lines if line in trained) / max(1, sum(map(len, lines)))


def _size(chunks: Sequence[DomainRow]) -> SplitSize:
    return SplitSize(len(chunks), len({chunk.file for chunk in chunks}), sum(len(chunk.text) for chunk in chunks))


def _write(
    folder: Path, train: Sequence[DomainRow], test: Sequence[DomainRow], summary: DomainSummary, origin: dict[str, str]
) -> None:
    for name, chunks in ((TRAIN, train), (TEST, test)):
        with (folder / name).open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(asdict(chunk), ensure_ascii=False) + "\n" for chunk in chunks)
    files = {name: file_sha256(folder / name) for name in (TRAIN, TEST)}
    sizes = {"train": asdict(summary.train), "test": asdict(summary.test), "dropped": summary.dropped}
    record = {"recipe": RECIPE_VERSION, "source": origin, **sizes, "files": files}
    (folder / SOURCES).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _existing(folder: Path) -> DomainSummary | None:
    """The complete domain in `folder`; None if there is nothing, or an older recipe's."""
    if not folder.exists():
        return None
    advice = "move it away, or build with force to replace it"
    try:
        record = json.loads((folder / SOURCES).read_text(encoding="utf-8"))
        hashes = {name: file_sha256(folder / name) for name in (TRAIN, TEST)}
        if hashes != record["files"]:
            raise DataError(f"{folder}: train.jsonl or test.jsonl was changed since it was built; {advice}")
        if record["recipe"] != RECIPE_VERSION:
            return None
        train, test = SplitSize(**record["train"]), SplitSize(**record["test"])
        return DomainSummary(folder, train, test, record["dropped"], built=False)
    except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(f"{folder}: not a complete domain ({type(error).__name__}: {error}); {advice}") from error


def _replace(folder: Path, fresh: Path, old: Path) -> None:
    if folder.exists():
        strangers = sorted({entry.name for entry in folder.iterdir()} - {TRAIN, TEST, SOURCES})
        if strangers:
            raise DataError(f"{folder}: holds files that are not ours ({strangers[:3]}); move them away first")
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        # Another process built the same domain meanwhile; a complete one is as good as ours.
        if _existing(folder) is None:
            raise
