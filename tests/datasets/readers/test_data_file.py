"""Reading rows: what is good comes through, what is bad is named by its line, what is hopeless is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.datasets.readers.common import BadRow, DataError, DataRow, ReadOptions
from fedmoe.datasets.readers.data_file import read_file


def rows_of(path: Path, content: bytes, max_row_bytes: int = 1000) -> list[DataRow | BadRow]:
    path.write_bytes(content)
    return list(read_file(path, ReadOptions(None, max_row_bytes)))


def test_jsonl_survives_bom_crlf_and_blank_lines(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b"}\r\n')
    assert rows == [DataRow(1, {"text": "a"}), DataRow(4, {"text": "b"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b'["text"]', "got a list"),
        (b'"text"', "got a string"),
        (b"null", "got null"),
        (b"3", "got a number"),
        (b'{"text": NaN}', "NaN is not allowed"),
        (b'{"text": 1e400}', "too large"),
        (b"{'text': 1}", "not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"text": "' + b"x" * 200_000 + b'"}', "longer than 150,000 bytes"),
    ],
)
def test_a_bad_line_is_named_and_its_neighbours_are_read(tmp_path: Path, line: bytes, reason: str) -> None:
    """Fault 61."""
    before, bad, after = rows_of(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"b": 2}\n', max_row_bytes=150_000)
    assert (before, after) == (DataRow(1, {"a": 1}), DataRow(3, {"b": 2}))
    assert isinstance(bad, BadRow)
    assert bad.line == 2
    assert reason in bad.reason


def test_a_line_cut_off_at_the_end_of_the_file_says_so(tmp_path: Path) -> None:
    good, bad = rows_of(tmp_path / "a.jsonl", b'{"text": "a"}\n{"text": "b')
    assert isinstance(good, DataRow)
    assert isinstance(bad, BadRow)
    assert bad.line == 2
    assert "cut off" in bad.reason


def test_a_huge_line_is_skipped_without_holding_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "')
        file.seek(500 * 1024 * 1024)  # a sparse file: 500 MB of NUL bytes in one line
        file.write(b'"}\n{"text": "b"}\n')
    script = (
        "import resource, sys; from pathlib import Path;"
        "from fedmoe.datasets.readers.data_file import ReadOptions, read_file;"
        "resource.setrlimit(resource.RLIMIT_AS, (400 * 1024**2, 400 * 1024**2));"
        "print([type(row).__name__ for row in read_file(Path(sys.argv[1]), ReadOptions(None, 2**20))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert done.stdout.strip() == "['BadRow', 'DataRow']", done.stderr


def test_a_json_array_gives_its_items(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.json", b'\n [{"text": "a"},\n 3]')
    assert rows == [DataRow(1, {"text": "a"}), BadRow(2, "expected an object like {...}, got a number")]


def test_a_broken_json_array_is_one_bad_row_at_the_line_of_the_error(tmp_path: Path) -> None:
    (bad,) = rows_of(tmp_path / "a.json", b'[{"text": "a"},\n{"text": ]')
    assert isinstance(bad, BadRow)
    assert bad.line == 2


def test_json_lines_may_be_called_json(tmp_path: Path) -> None:
    assert len(rows_of(tmp_path / "a.json", b'{"text": "a"}\n{"text": "b"}\n')) == 2


def test_csv_reads_quoted_cells_over_several_lines(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.csv", b'\xef\xbb\xbftext,n\r\n"a, ""b""\nc",1\r\n\r\n=1+1,2\r\n')
    assert rows == [DataRow(2, {"text": 'a, "b"\nc', "n": "1"}), DataRow(5, {"text": "=1+1", "n": "2"})]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a,b,c", "3 cells, but the header has 2"),
        (b"a", "1 cells, but the header has 2"),
        (b"\xff,b", "not UTF-8"),
        (b"x" * 2000 + b",b", "longer than 1,000 bytes"),
        (b'"a"b,c', "expected after"),
        (b"a," * 1000, "longer than 1,000 bytes"),
    ],
)
def test_a_bad_csv_row_is_named_and_its_neighbours_are_read(tmp_path: Path, line: bytes, reason: str) -> None:
    """Fault 62."""
    before, bad, after = rows_of(tmp_path / "a.csv", b"text,n\na,1\n" + line + b"\nb,2\n")
    assert (before, after) == (DataRow(2, {"text": "a", "n": "1"}), DataRow(4, {"text": "b", "n": "2"}))
    assert isinstance(bad, BadRow)
    assert bad.line == 3
    assert reason in bad.reason


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.csv", b'text\n"open\n' + b"good\n" * 500)
    assert isinstance(rows[0], BadRow)
    assert rows[0].line == 2
    assert sum(isinstance(row, DataRow) for row in rows) > 250


def test_a_csv_with_too_many_or_repeated_columns_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2,000 columns"):
        rows_of(tmp_path / "a.csv", b",".join(b"c%d" % i for i in range(2000)) + b"\n", max_row_bytes=100_000)
    with pytest.raises(DataError, match="more than once"):
        rows_of(tmp_path / "b.csv", b"text,text\na,b\n")


def test_a_table_separated_by_tabs_is_read(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "a.tsv", b'text\tn\na, b\t1\n"c\td"\t2\n')
    assert rows == [DataRow(2, {"text": "a, b", "n": "1"}), DataRow(3, {"text": "c\td", "n": "2"})]


def test_nul_bytes_in_a_table_are_named(tmp_path: Path) -> None:
    good, bad = rows_of(tmp_path / "a.csv", b"text,n\na,\nb\0,2\n")
    assert good == DataRow(2, {"text": "a", "n": ""})  # an empty cell is an empty string
    assert isinstance(bad, BadRow)
    assert "NUL" in bad.reason
    with pytest.raises(DataError, match="UTF-16"):
        rows_of(tmp_path / "b.csv", "text,n\na,b\n".encode("utf-16-le"))


def test_parquet_gives_nested_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    parquet.write_table(pyarrow.table({"messages": [turns, None]}), tmp_path / "a.parquet")
    assert list(read_file(tmp_path / "a.parquet", ReadOptions())) == [DataRow(1, {"messages": turns}), DataRow(2, {})]


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    """Fault 62."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"row {i}" for i in range(1000)]}), path)
    whole = path.read_bytes()
    metadata_length = int.from_bytes(whole[-8:-4], "little")
    damages = {
        "page": whole[:4] + b"\xff" * 40 + whole[44:],
        "footer": whole[: -8 - metadata_length] + b"\xff" * metadata_length + whole[-8:],
        "footer length": whole[:-8] + b"\xff\xff\xff\x7f" + whole[-4:],
        "cut off": whole[: len(whole) // 2],
    }
    for damaged in damages.values():
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="write the file anew"):
            list(read_file(path, ReadOptions()))


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"fedmoe\[worker\]"):
        list(read_file(tmp_path / "a.parquet", ReadOptions()))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "empty"),
        ("a.jsonl", b"\n\r\n", "no rows"),
        ("a.csv", b"text\n", "no rows"),
        ("a.json", b"[]", "no rows"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16"),
        ("a.xlsx", b"x", "save it as CSV"),
        ("a.data", b"x", r"rename it to \.jsonl"),
        ("a.data", b"\0", r"'\.data'; convert it to one of"),
        ("a.jsonl.lz4", b"x", "unpack it first"),
        ("a.jsonl", b"PK\x03\x04", "unpack it and give the folder"),
        ("a", b"x", "without suffix"),
    ],
)
def test_a_hopeless_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        rows_of(tmp_path / name, content)


def test_a_missing_file_and_a_folder_are_refused_before_iteration(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_file(tmp_path / "a.jsonl", ReadOptions())
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(DataError, match="not a file"):
        read_file(tmp_path / "b.jsonl", ReadOptions())


@given(st.lists(st.dictionaries(st.text(max_size=5), st.text() | st.integers() | st.none()), min_size=1, max_size=8))
def test_what_json_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, object]]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    path.write_text("\n".join(json.dumps(value) for value in values), encoding="utf-8")
    assert list(read_file(path, ReadOptions())) == [
        DataRow(number, {key: item for key, item in value.items() if item is not None})
        for number, value in enumerate(values, start=1)
    ]


@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".arrow", ".parquet"]))
def test_any_bytes_give_rows_bad_rows_or_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"a{suffix}"
    path.write_bytes(content)
    try:
        rows = list(read_file(path, ReadOptions(None, 50)))
    except DataError:
        return
    lines = [row.line for row in rows]
    assert rows
    assert lines == sorted(lines)
    assert lines[0] >= 1
