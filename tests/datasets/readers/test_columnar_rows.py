"""Parquet and Arrow: only wanted columns are read, nulls are not there, and every type is a value or a named row."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from fedmoe.datasets.readers.common import BadRow, DataError, DataRow, ReadOptions
from fedmoe.datasets.readers.data_file import read_file
from fedmoe.datasets.readers.data_source import open_source
from fedmoe.datasets.row_scan import check_file

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

if TYPE_CHECKING:
    from pyarrow import Table

NANOSECONDS = 1593382653123456789
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def write(path: Path, table: Table, rows_a_batch: int | None = None) -> Path:
    """Write a table as what the name says: .parquet, .arrow (a file) or .stream.arrow (a stream)."""
    if path.suffix == ".parquet":
        parquet.write_table(table, path)
        return path
    kind = pa.ipc.new_stream if ".stream" in path.name else pa.ipc.new_file
    with kind(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)
    return path


@pytest.fixture(params=["a.parquet", "a.arrow", "a.stream.arrow"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / str(request.param)


def test_only_wanted_columns_are_read(path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "created": pa.array([NANOSECONDS, 1], pa.timestamp("ns")), "text.x": [1, 2]})
    source = open_source(write(path, table), columns={"text", "messages"})
    assert list(source.rows()) == [DataRow(1, {"text": "a"}), DataRow(2, {"text": "b"})]
    assert source.options.unread == {"created", "text.x"}


def test_without_a_wanted_column_the_rows_are_counted(path: Path) -> None:
    source = open_source(write(path, pa.table({"question": ["a"] * 600})), columns={"text"})
    rows = list(source.rows())
    assert (rows[0], rows[-1], len(rows)) == (DataRow(1, {}), DataRow(600, {}), 600)
    assert source.options.unread == {"question"}


def test_json_is_read_as_what_it_says(path: Path) -> None:
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": None}}]},
    ]
    storage = pa.array([[json.dumps(turn) for turn in turns], None], pa.list_(pa.string()))
    table = pa.table({"messages": storage.cast(pa.list_(pa.json_())), "text": ["{}", '"b"']})
    rows = list(open_source(write(path, table)).rows())
    assert rows == [DataRow(1, {"messages": turns, "text": "{}"}), DataRow(2, {"text": '"b"'})]


def test_json_that_is_none_is_a_bad_row_that_names_its_column(path: Path) -> None:
    storage = pa.array([["{"], ['{"role": "user"}']], pa.list_(pa.string()))
    rows = list(open_source(write(path, pa.table({"messages": storage.cast(pa.list_(pa.json_()))}))).rows())
    assert isinstance(rows[0], BadRow)
    assert "'messages'" in rows[0].reason
    assert rows[1] == DataRow(2, {"messages": [{"role": "user"}]})


def test_nulls_are_not_there_at_any_depth(path: Path) -> None:
    call = pa.struct({"name": pa.string(), "arguments": pa.string()})
    turn = pa.struct({"role": pa.string(), "content": pa.string(), "call": call})
    none = {"name": None, "arguments": None}
    turns = [{"role": "user", "content": "a", "call": none}, {"role": "assistant", "content": None, "call": None}]
    table = pa.table(
        {"messages": pa.array([turns, None], pa.list_(turn)), "text": pa.nulls(2), "score": [float("nan"), 1.5]}
    )
    assert list(read_file(write(path, table), ReadOptions())) == [
        DataRow(1, {"messages": [{"role": "user", "content": "a"}, {"role": "assistant"}]}),
        DataRow(2, {"score": 1.5}),
    ]


def test_types_of_public_files_become_plain_values(path: Path) -> None:
    table = pa.table(
        {
            "large": pa.array(["a"], pa.large_string()),
            "coded": pa.array(["a"]).dictionary_encode(),
            "bytes": pa.array(["ä".encode()]),
            "image": pa.array([b"\xff\xd8"]),
            "map": pa.array([[("k", "v")]], pa.map_(pa.string(), pa.string())),
            "turns": pa.array([TURNS], pa.large_list(pa.struct({"role": pa.string(), "content": pa.string()}))),
            "amount": [decimal.Decimal("1.50")],
            "when": pa.array([NANOSECONDS], pa.timestamp("ns", "Europe/Berlin")),
            "log": [[{"at": datetime.datetime(2020, 1, 2), "cost": decimal.Decimal("0.1")}]],
        }
    )
    (row,) = read_file(write(path, table), ReadOptions())
    assert isinstance(row, DataRow)
    assert row.fields == {
        "large": "a",
        "coded": "a",
        "bytes": "ä",
        "image": b"\xff\xd8",
        "map": {"k": "v"},
        "turns": TURNS,
        "amount": decimal.Decimal("1.50"),
        "when": datetime.datetime(2020, 6, 28, 22, 17, 33, 123456),
        "log": [{"at": "2020-01-02 00:00:00", "cost": "0.1"}],
    }


def test_a_used_column_of_another_type_is_named_in_its_rows(path: Path) -> None:
    dates = pa.array([NANOSECONDS, 1], pa.timestamp("ns"))
    report = check_file(write(path, pa.table({"prompt": dates, "completion": ["a", "b"]})))
    assert report.problem is not None
    assert "line 2: 'prompt' must be a string, got datetime" in report.problem


def test_a_value_that_python_has_not_is_a_bad_row_and_its_neighbours_are_read(path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c"], "when": pa.array([0, 10**15, 0], pa.timestamp("ms"))})
    rows = list(read_file(write(path, table), ReadOptions()))
    assert [type(row) for row in rows] == [DataRow, BadRow, DataRow]
    assert isinstance(rows[1], BadRow)
    assert rows[1].line == 2
    assert "'when' (timestamp[ms]) cannot be read" in rows[1].reason


def test_columns_of_one_name_are_refused_where_they_are_wanted(path: Path) -> None:
    write(path, pa.table([["a"], [1], [2]], names=["text", "n", "n"]))
    assert list(open_source(path, columns={"text"}).rows()) == [DataRow(1, {"text": "a"})]
    with pytest.raises(DataError, match=r"more than once: \['n'\]"):
        list(read_file(path, ReadOptions()))


def test_text_that_is_not_utf_8_is_a_bad_row(tmp_path: Path) -> None:
    text = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    rows = list(read_file(write(tmp_path / "a.parquet", pa.table({"text": text})), ReadOptions()))
    assert [type(row) for row in rows] == [DataRow, BadRow, DataRow]


def test_rows_keep_their_numbers_over_batches(tmp_path: Path) -> None:
    table = pa.table({"text": [str(number) for number in range(1, 1501)]})
    for name in ("a.arrow", "a.stream.arrow"):
        rows = list(read_file(write(tmp_path / name, table, rows_a_batch=700), ReadOptions()))
        assert [str(row.line) for row in rows] == [getattr(row, "fields", {})["text"] for row in rows]


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.table({"text": ["a"]})).rename(tmp_path / "a.jsonl")
    write(tmp_path / "b.arrow", pa.table({"text": ["a"]})).rename(tmp_path / "b.csv")
    for name in ("a.jsonl", "b.csv"):
        assert list(read_file(tmp_path / name, ReadOptions())) == [DataRow(1, {"text": "a"})]


def test_a_damaged_arrow_file_is_refused(tmp_path: Path) -> None:
    for name in ("a.arrow", "a.stream.arrow"):
        path = write(tmp_path / name, pa.table({"text": [f"row {number}" for number in range(1000)]}))
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], whole[:8] + b"\xff" * 200 + whole[208:], b"no arrow at all"):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="cannot be decoded as Arrow"):
                list(read_file(path, ReadOptions()))


def test_offsets_that_point_elsewhere_are_not_followed(tmp_path: Path) -> None:
    """Fault 62."""
    path = write(tmp_path / "a.arrow", pa.table({"text": ["aaaa", "bbbb", "cccc"]}))
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 4, 8, 12))
    whole = path.read_bytes()
    assert offsets in whole
    path.write_bytes(whole.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f" + offsets[12:]))
    with pytest.raises(DataError, match="cannot be decoded as Arrow"):
        list(read_file(path, ReadOptions()))


def saved_to_disk(folder: Path, *texts: str) -> Path:
    """What `Dataset.save_to_disk` writes: the shards, and the two files that describe them."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05}-of-{len(texts):05}.arrow" for number in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        with pa.ipc.new_stream(str(folder / name), pa.schema({"text": pa.string()})) as writer:
            writer.write_table(pa.table({"text": [text]}))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text('{"features": {}}')
    return folder


def test_a_saved_data_set_is_read_without_its_caches(tmp_path: Path) -> None:
    folder = saved_to_disk(tmp_path / "saved", "a", "b")
    (folder / "cache-1f.arrow").write_bytes((folder / "data-00000-of-00002.arrow").read_bytes())
    source = open_source(folder)
    assert [getattr(row, "fields", {}) for row in source.rows()] == [{"text": "a"}, {"text": "b"}]
    (folder / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"state\.json names data-00001-of-00002\.arrow, which is not there"):
        open_source(folder)


def test_of_saved_splits_the_training_one_is_read(tmp_path: Path) -> None:
    saved_to_disk(tmp_path / "train", "a")
    saved_to_disk(tmp_path / "test", "b")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for name, text in ((str(tmp_path), "a"), (f"{tmp_path}:test", "b"), (f"{tmp_path}/test", "b")):
        assert [getattr(row, "fields", {}) for row in open_source(name).rows()] == [{"text": text}]


def test_the_cache_of_datasets_is_read(tmp_path: Path) -> None:
    folder = saved_to_disk(tmp_path / "cache", "a", "b")
    (folder / "state.json").unlink()
    (folder / "data-00000-of-00002.arrow").rename(folder / "name-train.arrow")
    (folder / "data-00001-of-00002.arrow").rename(folder / "cache-1f.arrow")
    assert [row.file for row in open_source(folder).rows()] == ["name-train.arrow"]
