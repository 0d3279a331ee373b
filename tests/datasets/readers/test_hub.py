"""Data sets of a hub, with a stand-in for the library that fetches them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.readers.data_source import HubId, open_source, parse_hub_id


@pytest.mark.parametrize(
    ("text", "hub_id"),
    [
        ("owner/name", HubId("owner/name")),
        ("owner/na.me-1@v1.0:test", HubId("owner/na.me-1", None, "v1.0", "test")),
        ("owner/name/config:train_sft", HubId("owner/name", "config", None, "train_sft")),
        ("owner/name@refs/pr/1", HubId("owner/name", None, "refs/pr/1")),
        ("owner/rows.jsonl", None),
        ("owner/rows.jsonl.gz", None),
        ("name", None),
        ("/owner/name", None),
        ("./owner/name", None),
        ("../owner", None),
    ],
)
def test_an_id_is_told_from_a_path(text: str, hub_id: HubId | None) -> None:
    assert parse_hub_id(text) == hub_id


def test_a_name_below_a_folder_that_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match="no such file"):
        open_source("data/train")


class StandIn(ModuleType):
    """`datasets` as far as it is used: what it was asked for, and the files that it keeps of each split."""

    def __init__(self, splits: Mapping[str, list[Path]] | Exception) -> None:
        super().__init__("datasets")
        self.splits = splits
        self.asked: list[tuple[object, ...]] = []

    def load_dataset(self, path: str, *, name: str | None, revision: str | None) -> dict[str, SimpleNamespace]:
        self.asked.append((path, name, revision))
        if isinstance(self.splits, Exception):
            raise self.splits
        return {
            split: SimpleNamespace(cache_files=[{"filename": str(file)} for file in files])
            for split, files in self.splits.items()
        }


@pytest.fixture
def kept(tmp_path: Path) -> dict[str, list[Path]]:
    pa = pytest.importorskip("pyarrow")
    files = {}
    for split in ("train", "test"):
        files[split] = [tmp_path / f"name-{split}.arrow"]
        with pa.ipc.new_stream(str(files[split][0]), pa.schema({"text": pa.string(), "n": pa.int64()})) as writer:
            writer.write_table(pa.table({"text": [split, None], "n": [1, 2]}))
    return files


def test_the_training_split_of_a_hub_is_read(kept: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn(kept)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    source = open_source("owner/name/config@v1", columns={"text"})
    assert [getattr(row, "fields", {}) for row in source.rows()] == [{"text": "train"}, {}]
    assert stand_in.asked == [("owner/name", "config", "v1")]
    assert source.options.unread == {"n"}
    assert source.left_out == ("test: not trained on, beside train",)
    assert source.fingerprint() != open_source("owner/name:test").fingerprint()


def test_a_split_is_chosen_by_the_name_that_the_message_names(
    kept: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", StandIn({"test": kept["test"]}))
    with pytest.raises(DataError, match=r"no split called train, but test; name one: owner/name@v1:test") as refused:
        open_source("owner/name@v1")
    chosen = str(refused.value).rpartition("name one: ")[2]
    assert [getattr(row, "fields", {}).get("text") for row in open_source(chosen).rows()] == ["test", None]
    with pytest.raises(DataError, match="no split 'dev'; there is test"):
        open_source("owner/name:dev")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"owner/name: no such file or folder here.*fedmoe\[hub\]"):
        open_source("owner/name")


def test_what_the_hub_refuses_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", StandIn(ConnectionError("cannot reach it\nlong story")))
    with pytest.raises(DataError, match=r"ConnectionError: cannot reach it; check the name, the network, and HF_TOKEN"):
        open_source("owner/name")


def test_rows_that_are_kept_in_memory_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", StandIn({"train": []}))
    with pytest.raises(DataError, match="keeps it in memory"):
        open_source("owner/name")
