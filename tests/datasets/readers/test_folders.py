"""Folders: which files are data, in which order, which splits are trained on, and what is said about the rest."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from fedmoe.datasets.readers.common import BadRow, DataError, DataRow
from fedmoe.datasets.readers.data_source import DataSource, open_source
from fedmoe.datasets.row_scan import RowOptions, check_file


def folder_of(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        content = (json.dumps({"text": name}) + "\n").encode()
        (root / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return root


def names_of(source: DataSource) -> list[str]:
    return [row.file for row in source.rows()]


def test_all_files_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ("part-2.jsonl", "part-10.ndjson.gz", "sub/part-1.json", "sub/deeper/x.jsonl")
    source = open_source(folder_of(tmp_path, *reversed(names)))
    assert names_of(source) == ["part-2.jsonl", "part-10.ndjson.gz", "sub/deeper/x.jsonl", "sub/part-1.json"]
    assert next(iter(source.rows())) == DataRow(1, {"text": "part-2.jsonl"}, "part-2.jsonl")


def test_what_is_no_data_is_left_out_and_named(tmp_path: Path) -> None:
    others = ("README.md", "dataset_infos.json", "package.json", "notes.txt")
    folder_of(tmp_path, "a.jsonl", "_SUCCESS", ".hidden.jsonl", ".git/x.jsonl", *others)
    (tmp_path / "settings.json").write_text('{\n  "text": "no row"\n}\n')
    (tmp_path / "part-empty.jsonl").write_bytes(b"")
    source = open_source(tmp_path)
    assert names_of(source) == ["a.jsonl"]
    (note,) = source.left_out
    assert "README.md" in note
    assert "and 1 more: no rows" in note


@pytest.mark.parametrize(
    ("files", "read", "left"),
    [
        (("train.jsonl", "test.jsonl"), ["train.jsonl"], "test"),
        (("train/a.jsonl", "train/b.jsonl", "test/a.jsonl"), ["train/a.jsonl", "train/b.jsonl"], "test"),
        (
            ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation-00000-of-00001.jsonl"),
            ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
            "validation",
        ),
        (("name-train.jsonl", "name-dev.jsonl"), ["name-train.jsonl"], "dev"),
        (("rows.jsonl", "eval_rows.jsonl"), ["rows.jsonl"], "eval_rows"),
        (("train_code.jsonl", "train_maths.jsonl", "val.jsonl"), ["train_code.jsonl", "train_maths.jsonl"], "val"),
        (("train.jsonl", "extra.jsonl", "test.jsonl"), ["train.jsonl"], "extra.jsonl"),
        (("trainset.jsonl", "testset.jsonl"), ["trainset.jsonl"], "testset"),
        (("myTrain.jsonl", "myTestRows.jsonl"), ["myTrain.jsonl"], "TestRows"),
        (("rows.jsonl", "tests.jsonl"), ["rows.jsonl"], "tests"),
        (("rows.jsonl", "hold_out.jsonl"), ["rows.jsonl"], "hold_out"),
        (("rows.jsonl", "validate.jsonl"), ["rows.jsonl"], "validate"),
    ],
)
def test_held_out_rows_are_never_trained_on_in_silence(
    tmp_path: Path, files: tuple[str, ...], read: list[str], left: str
) -> None:
    source = open_source(folder_of(tmp_path, *files))
    assert names_of(source) == read
    assert any(left in note and "not trained on" in note for note in source.left_out)


def test_words_that_only_contain_a_split_are_no_split(tmp_path: Path) -> None:
    source = open_source(folder_of(tmp_path, "latest.jsonl", "trainers.jsonl", "devices.jsonl"))
    assert len(names_of(source)) == 3
    assert source.left_out == ()


def test_a_split_can_be_chosen(tmp_path: Path) -> None:
    folder_of(tmp_path, "train.jsonl", "test/b.jsonl")
    assert names_of(open_source(f"{tmp_path}:test")) == ["test/b.jsonl"]
    assert names_of(open_source(tmp_path / "test")) == ["b.jsonl"]
    with pytest.raises(DataError, match=r"no split 'dev'; there is test, train"):
        open_source(f"{tmp_path}:dev")


@pytest.mark.parametrize(
    ("files", "message"),
    [((), "it empty"), (("README.md", "a.png"), r"found README\.md, a\.png"), ((".a.jsonl",), "hidden names")],
)
def test_a_folder_without_data_is_refused_with_what_is_there(
    tmp_path: Path, files: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_source(folder_of(tmp_path, *files))


def test_links_that_go_in_circles_end(tmp_path: Path) -> None:
    folder_of(tmp_path, "sub/a.jsonl")
    (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    assert names_of(open_source(tmp_path)) == ["sub/a.jsonl"]
    (tmp_path / "self.jsonl").symlink_to(tmp_path / "self.jsonl")
    with pytest.raises(DataError, match=r"self\.jsonl: no such file"):
        names_of(open_source(tmp_path))


def test_bad_rows_are_named_by_file_and_line(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jsonl", "b.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\nno\n{"text": ""}\n')
    report = check_file(tmp_path, RowOptions(max_bad_fraction=0.9))
    assert [(row.file, row.line) for row in report.bad] == [("b.jsonl", 2), ("b.jsonl", 3)]
    assert "b.jsonl line 2: not JSON" in report.text
    assert BadRow(2, "", "").place == "line 2"


def test_a_part_without_rows_is_passed_over_but_not_the_whole(tmp_path: Path) -> None:
    folder_of(tmp_path, "b.jsonl")
    (tmp_path / "a.csv").write_text("text\n")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b""))
    assert names_of(open_source(tmp_path)) == ["b.jsonl"]
    (tmp_path / "b.jsonl").unlink()
    with pytest.raises(DataError, match="not one of 2 files holds a row"):
        list(open_source(tmp_path).rows())


def test_a_fingerprint_knows_names_and_content(tmp_path: Path) -> None:
    one, same, renamed = (folder_of(tmp_path / n, f) for n, f in (("1", "a.jsonl"), ("2", "a.jsonl"), ("3", "b.jsonl")))
    (renamed / "b.jsonl").write_bytes((one / "a.jsonl").read_bytes())
    prints = [open_source(folder).fingerprint() for folder in (one, same, renamed)]
    assert prints[0] == prints[1] != prints[2]
    (one / "a.jsonl").write_text('{"text": "other"}\n')
    assert open_source(one).fingerprint() != prints[0]
    file = same / "a.jsonl"
    assert open_source(file).fingerprint() == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    """Fault 63."""
    path = folder_of(tmp_path, "a.jsonl") / "a.jsonl"
    rows = open_source(path).rows()
    next(rows)
    with path.open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match="changed while it was read"):
        list(rows)


def test_what_may_not_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    folder_of(tmp_path, "a.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: Permission denied; check its permissions"):
            open_source(tmp_path / "a.jsonl")
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(DataError, match="cannot be listed: Permission denied"):
        open_source(tmp_path)


def test_a_name_that_is_no_path_is_refused(tmp_path: Path) -> None:
    for name in ("x" * 5000, str(tmp_path / "no" / "such.jsonl"), str(tmp_path / "no") + ":train"):
        with pytest.raises(DataError, match="check the path"):
            open_source(name)
