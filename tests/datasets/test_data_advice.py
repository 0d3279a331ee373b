"""What an error advises works when it is followed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.readers.data_source import open_source

TEXTS = ["a, b", 'say "c"', "d;e"]


def texts(name: str | Path) -> list[object]:
    return [getattr(row, "fields", {}).get("text") for row in open_source(name).rows()]


def advice(name: str | Path) -> str:
    with pytest.raises(DataError) as refused:
        texts(name)
    return str(refused.value)


def follow(message: str, folder: Path) -> None:
    """Run the command that stands on the message's last line."""
    assert shutil.which("python3")
    subprocess.run(message.splitlines()[-1], shell=True, cwd=folder, check=True)


def test_a_text_file_becomes_rows_by_the_command_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('one\n\nsays "two" \\n\n')
    follow(advice(tmp_path / "a.txt"), tmp_path)
    assert texts(tmp_path / "a.jsonl") == ["one", 'says "two" \\n']


def test_semicolons_become_commas_by_the_command_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('n;text\n1;"a, b"\n2;"say ""c"""\n3;"d;e"\n')
    follow(advice(tmp_path / "a.csv"), tmp_path)
    assert texts(tmp_path / "commas.csv") == TEXTS


def test_lines_that_end_with_cr_become_lines_by_the_command_that_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'n,text\r1,"a, b"\r2,"say ""c"""\r3,d;e\r')
    follow(advice(tmp_path / "a.csv"), tmp_path)
    assert texts(tmp_path / "lines.csv") == TEXTS


@pytest.mark.parametrize(("given", "other", "separator"), [(".csv", ".tsv", "\t"), (".tsv", ".csv", ",")])
def test_a_table_with_another_separator_is_renamed(tmp_path: Path, given: str, other: str, separator: str) -> None:
    path = tmp_path / f"a{given}"
    path.write_text(f"n{separator}text\n1{separator}hello\n")
    suffix = re.search(r"rename the file to (\S+)", advice(path))
    assert suffix is not None
    assert texts(path.rename(tmp_path / f"a{suffix[1]}")) == ["hello"]
    assert suffix[1] == other


def test_an_archive_is_unpacked_and_its_folder_given(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.write(tmp_path / "rows.jsonl", "rows.jsonl")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "rows.jsonl", "rows.jsonl")
    for name in ("a.zip", "a.tar.gz"):
        assert "unpack it and give the folder" in advice(tmp_path / name)
        shutil.unpack_archive(tmp_path / name, tmp_path / f"from-{name}")
        assert texts(tmp_path / f"from-{name}") == ["a"]


def test_a_file_of_utf_16_is_saved_as_utf_8(tmp_path: Path) -> None:
    row = json.dumps({"text": "ä"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(row, encoding="utf-16")
    assert "save it as UTF-8" in advice(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(row, encoding="utf-8")
    assert texts(tmp_path / "a.jsonl") == ["ä"]


SPLITS: Mapping[str, tuple[str, ...]] = {
    "only held-out rows": ("test.jsonl",),
    "several training splits": ("data/train_gen-00000-of-00001.jsonl", "data/train_sft-00000-of-00001.jsonl"),
    "several data sets": ("main/train-00000-of-00001.jsonl", "other/train-00000-of-00001.jsonl"),
    "a file and its copy": ("a.jsonl", "a.jsonl.gz"),
}


@pytest.mark.parametrize("files", SPLITS.values(), ids=SPLITS.keys())
def test_what_a_folder_is_refused_for_is_chosen_by_the_name_that_is_named(
    tmp_path: Path, files: tuple[str, ...]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    chosen = advice(tmp_path).rpartition(": ")[2]
    assert texts(chosen) == [files[0]]


def test_json_lines_under_another_name_are_renamed(tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text('{"text": "a"}\n')
    assert "rename it to .jsonl" in advice(tmp_path / "a.data")
    assert texts((tmp_path / "a.data").rename(tmp_path / "a.jsonl")) == ["a"]


def test_a_pointer_of_git_lfs_names_the_command(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in advice(tmp_path / "a.jsonl")
