"""The demo domains: split by file, nothing of the test set in the train set, built whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from fedmoe.datasets.demo import sources
from fedmoe.datasets.demo.chunks import book_chunks, prose_chunks, python_functions, sql_chunks
from fedmoe.datasets.demo.domains import GENERAL_RECIPES, RECIPES, Recipe, build_domains, is_test, split_chunks
from fedmoe.datasets.demo.sources import Document, Package, read_archive
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.row_scan import check_file


def paragraph(name: str, number: int) -> str:
    return f"{name} paragraph {number} says that " + f"{name}{number} words follow, " * 12


def tar_gz(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A domain of 60 small documents in an archive under `tmp_path / 'archives'`."""
    (tmp_path / "archives").mkdir()
    text = {f"pack-1/docs/{i}.txt": "\n\n".join(paragraph(f"d{i}", k) for k in range(5)).encode() for i in range(60)}
    archive = tar_gz(tmp_path / "archives" / "pack-1.tar.gz", {**text, "pack-1/setup.py": b"raise SystemExit"})
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return Recipe(Package("pack", "1", archive.name, digest, "MIT", lambda path: path.suffix == ".txt"), prose_chunks)


def test_a_domain_is_built_split_by_file_and_fit_for_training(tmp_path: Path, recipe: Recipe) -> None:
    summary = build_domains(tmp_path / "out", ["d"], archives=tmp_path / "archives", recipes={"d": recipe})["d"]
    train, test = (check_file(summary.folder / name) for name in ("train.jsonl", "test.jsonl"))
    rows = [json.loads(line) for line in (summary.folder / "test.jsonl").read_text().splitlines()]
    assert train.good == summary.train.rows
    assert test.good == summary.test.rows == len(rows)
    assert all(is_test(row["file"]) for row in rows)
    assert summary.train.files + summary.test.files == 60
    origin = json.loads((summary.folder / "sources.json").read_text())["source"]
    assert (origin["package"], origin["version"]) == ("pack", "1")
    assert isinstance(recipe.source, Package)
    assert origin["sha256"] == recipe.source.sha256
    assert {entry.name for entry in (tmp_path / "out").iterdir()} == {"d"}


def test_text_that_nobody_trains_on_is_held_out_whole(tmp_path: Path, recipe: Recipe) -> None:
    held_out = {"d": replace(recipe, held_out=True)}
    for built in (True, False):
        summary = build_domains(tmp_path / "out", ["d"], archives=tmp_path / "archives", recipes=held_out)["d"]
        assert (summary.train.rows, summary.test.files, summary.built) == (0, 60, built)
    split = build_domains(tmp_path / "split", ["d"], archives=tmp_path / "archives", recipes={"d": recipe})["d"]
    assert summary.test.rows >= split.train.rows + split.test.rows


def test_general_text_is_of_a_source_that_no_domain_has() -> None:
    sources = [recipe.source for recipe in RECIPES.values()]
    assert all(recipe.held_out and recipe.source not in sources for recipe in GENERAL_RECIPES.values())
    assert not GENERAL_RECIPES.keys() & RECIPES.keys()


def test_building_twice_changes_nothing_unless_forced(tmp_path: Path, recipe: Recipe) -> None:
    def build(force: bool = False) -> bool:
        return build_domains(
            tmp_path / "out", ["d"], force=force, archives=tmp_path / "archives", recipes={"d": recipe}
        )["d"].built

    assert build()
    before = (tmp_path / "out" / "d" / "train.jsonl").read_bytes()
    inode = (tmp_path / "out" / "d").stat().st_ino
    assert not build()
    assert (tmp_path / "out" / "d").stat().st_ino == inode
    assert build(force=True)
    assert (tmp_path / "out" / "d" / "train.jsonl").read_bytes() == before


def test_a_domain_changed_by_hand_is_neither_used_nor_lost(tmp_path: Path, recipe: Recipe) -> None:
    arguments = {"archives": tmp_path / "archives", "recipes": {"d": recipe}}
    folder = build_domains(tmp_path / "out", ["d"], **arguments)["d"].folder  # type: ignore[arg-type]
    (folder / "train.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(DataError, match="was changed"):
        build_domains(tmp_path / "out", ["d"], **arguments)  # type: ignore[arg-type]
    (folder / "notes.md").write_text("keep me")
    with pytest.raises(DataError, match=r"not ours \(\['notes.md'\]\)"):
        build_domains(tmp_path / "out", ["d"], force=True, **arguments)  # type: ignore[arg-type]
    assert (folder / "notes.md").read_text() == "keep me"
    (folder / "notes.md").unlink()
    (folder / "sources.json").unlink()
    with pytest.raises(DataError, match="not a complete domain"):
        build_domains(tmp_path / "out", ["d"], **arguments)  # type: ignore[arg-type]
    assert build_domains(tmp_path / "out", ["d"], force=True, **arguments)["d"].built  # type: ignore[arg-type]


def test_an_older_recipe_is_built_anew(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"archives": tmp_path / "archives", "recipes": {"d": recipe}}
    build_domains(tmp_path / "out", ["d"], **arguments)  # type: ignore[arg-type]
    monkeypatch.setattr("fedmoe.datasets.demo.domains.RECIPE_VERSION", 999)
    assert build_domains(tmp_path / "out", ["d"], **arguments)["d"].built  # type: ignore[arg-type]


def test_a_failed_build_leaves_nothing_behind_and_the_old_data_alone(tmp_path: Path, recipe: Recipe) -> None:
    arguments = {"archives": tmp_path / "archives", "recipes": {"d": recipe}}
    folder = build_domains(tmp_path / "out", ["d"], **arguments)["d"].folder  # type: ignore[arg-type]
    before = (folder / "train.jsonl").read_bytes()
    broken = replace(recipe, chunks=lambda text: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        build_domains(tmp_path / "out", ["d"], force=True, archives=tmp_path / "archives", recipes={"d": broken})
    assert (folder / "train.jsonl").read_bytes() == before
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["d"]


def test_an_archive_with_other_content_is_not_used(tmp_path: Path, recipe: Recipe) -> None:
    tar_gz(tmp_path / "archives" / "pack-1.tar.gz", {"pack-1/a.txt": b"other"})
    with pytest.raises(DataError, match=r"expected sha256 .* got .* not used"):
        build_domains(tmp_path / "out", ["d"], archives=tmp_path / "archives", recipes={"d": recipe})
    (tmp_path / "archives" / "pack-1.tar.gz").unlink()
    with pytest.raises(DataError, match=r"no such file; put pack-1.tar.gz there"):
        build_domains(tmp_path / "out", ["d"], archives=tmp_path / "archives", recipes={"d": recipe})


def test_an_unknown_domain_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\['rust'\]; known are python, sql, docs"):
        build_domains(tmp_path, ["rust"])


def test_without_pip_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.datasets.demo.sources.importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="ensurepip"):
        build_domains(tmp_path, ["sql"])


def test_duplicates_and_overlap_never_reach_the_test_set() -> None:
    names = [f"{i}.txt" for i in range(200)]
    in_train = next(name for name in names if not is_test(name))
    in_test = [name for name in names if is_test(name)][:3]
    shared = "a sentence that both files hold, long enough to tell\n" * 5
    documents = [
        Document(in_train, shared),
        Document(in_test[0], shared.replace("\n", "   \n")),
        Document(in_test[1], shared + "and one more line that is new here\n"),
        Document(in_test[2], "something else entirely, nowhere to be found in train\n" * 5),
    ]
    train, test, dropped = split_chunks(documents, lambda text: [text])
    assert [chunk.file for chunk in train] == [in_train]
    assert [chunk.file for chunk in test] == [in_test[2]]
    assert dropped == 2


def test_a_large_source_is_cut_at_whole_files() -> None:
    documents = [Document(f"{i}.txt", f"{i} " + "x" * 99_998) for i in range(60)]
    train, test, _ = split_chunks(documents, lambda text: [text])
    assert 3_900_000 <= sum(len(chunk.text) for chunk in (*train, *test)) <= 4_000_000


def test_an_archive_is_read_by_name_and_size(tmp_path: Path) -> None:
    big = b"x" * (sources.MAX_DOCUMENT_BYTES + 1)
    members = {"p/a.txt": b"a\r\nb", "p/big.txt": big, "p/latin.txt": b"\xff", "p/../../evil.py": b"e", "p/b.py": b"b"}
    path = tar_gz(tmp_path / "a.tar.gz", members)
    assert list(read_archive(path, lambda name: name.suffix == ".txt")) == [Document("a.txt", "a\nb")]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.tar.gz"]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"cannot be read as \.tar\.gz"):
        list(read_archive(path, lambda name: True))


def test_python_chunks_are_whole_functions_with_docstrings() -> None:
    body = "    x = 1\n" * 30
    source = (
        "import os\n\n"
        f'@decorate\ndef outer(a):\n    """Doc."""\n{body}    def inner():\n        """Doc."""\n    return inner\n\n'
        f'class C:\n    async def method(self):\n        """Doc."""\n{body.replace("    x", "        x")}\n'
        f"def bare():\n{body}\n"
        'def short():\n    """Doc."""\n'
    )
    outer, method = python_functions(source)
    assert outer.startswith("@decorate\ndef outer")
    assert outer.endswith("return inner")
    assert method.startswith("async def method(self):\n    ")
    assert python_functions("def broken(:") == []


def test_sql_chunks_end_at_statements_and_hold_no_data() -> None:
    function = "CREATE FUNCTION f() AS $body$\nBEGIN;\n\n  " + "SELECT 'some words here';\n" * 10 + "END;\n$body$;\n"
    data = "COPY t FROM stdin;\n1\t2\n\\.\n"
    filler = "".join(f"SELECT column_{i}, other FROM some_table; -- a comment\n" for i in range(40))
    chunks = sql_chunks(function + data + filler + "x" * 3000 + ";\n")
    assert function.strip() in chunks[0]
    assert all("\t2" not in chunk and "xxx" not in chunk for chunk in chunks)
    assert all("-- a comment" in chunk.splitlines()[-1] for chunk in chunks[1:])
    assert sum(chunk.count("some_table") for chunk in chunks) == 40
    assert sql_chunks("INSERT INTO t VALUES (" + "1234567890, " * 30 + "1);\n") == []


def test_a_book_is_what_stands_between_the_marks_with_its_lines_joined() -> None:
    story = "It was a dark\nand stormy night.\n\n\n  Rain fell\nin torrents.\n"
    file = f"About this file.\n\n*** START OF THE EBOOK X ***\n\n{story}\n*** END OF THE EBOOK X ***\n\nLicence.\n"
    padded = file.replace("torrents.", "torrents. " + "More rain. " * 20)
    (chunk,) = book_chunks(padded)
    assert chunk.startswith("It was a dark and stormy night.\n\nRain fell in torrents. More")
    assert "Licence" not in chunk
    assert book_chunks(story * 9)[0].startswith("It was a dark and stormy night.")


def test_prose_chunks_are_whole_paragraphs() -> None:
    paragraphs = [paragraph("p", i).strip() for i in range(10)]
    chunks = prose_chunks("\n\n".join(paragraphs))
    assert "\n\n".join(chunks) == "\n\n".join(paragraphs)
    assert all(200 <= len(chunk) <= 1000 for chunk in chunks)


def test_the_recipes_take_the_files_meant() -> None:
    accepts = {name: recipe.source.accepts for name, recipe in RECIPES.items() if isinstance(recipe.source, Package)}
    wanted = {
        "sql": ["libpg_query/test/sql/postgres_regress/join.sql"],
        "docs": ["docs/topics/db/queries.txt", "docs/index.txt"],
    }
    unwanted = {
        "sql": ["tests/a.sql", "libpg_query/test/sql/postgres_regress/numeric_big.sql", "libpg_query/README.md"],
        "docs": ["docs/releases/5.0.txt", "docs/requirements.txt", "django/a.txt", "docs/conf.py"],
    }
    for name in ("sql", "docs"):
        assert all(accepts[name](PurePosixPath(path)) for path in wanted[name])
        assert not any(accepts[name](PurePosixPath(path)) for path in unwanted[name])
    assert RECIPES["python"].source is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sql", "docs"])
def test_the_packaged_domains_build_from_the_index(tmp_path: Path, name: str) -> None:
    summary = build_domains(tmp_path, [name])[name]
    assert summary.test.files >= 20
    assert summary.train.chars > 1_000_000
    assert check_file(summary.folder / "train.jsonl").bad_count == 0
