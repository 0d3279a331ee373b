"""Compressed files: known by their content, read as a stream, and named where they break."""

from __future__ import annotations

import bz2
import gzip
import lzma
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedmoe.datasets.readers.common import BadRow, DataError, DataRow, ReadOptions
from fedmoe.datasets.readers.data_file import read_file

ROWS = b"".join(b'{"text": "row %d"}\n' % number for number in range(2000))


def zstd(content: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", ["a.jsonl{}", "a.ndjson{}", "a.json{}", "a.JSONL{}", "a.jsonl"])
def test_a_compressed_file_is_read_whatever_its_name_says(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / name.format(suffix)
    path.write_bytes(PACKERS[suffix](ROWS))
    rows = list(read_file(path, ReadOptions()))
    assert rows[:1] == [DataRow(1, {"text": "row 0"})]
    assert rows[-1] == DataRow(2000, {"text": "row 1999"})


@pytest.mark.parametrize("suffix", PACKERS)
def test_parts_packed_one_after_another_are_all_read(tmp_path: Path, suffix: str) -> None:
    pack = PACKERS[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(ROWS) + pack(b'{"text": "last"}\n'))
    assert list(read_file(tmp_path / f"a.jsonl{suffix}", ReadOptions()))[-1] == DataRow(2001, {"text": "last"})


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_json_array_and_a_csv_are_read_out_of_a_compressed_file(tmp_path: Path, suffix: str) -> None:
    pack = PACKERS[suffix]
    (tmp_path / f"a.json{suffix}").write_bytes(pack(b'[{"text": "a"}]'))
    (tmp_path / f"a.csv{suffix}").write_bytes(pack(b"text\na\n"))
    assert list(read_file(tmp_path / f"a.json{suffix}", ReadOptions())) == [DataRow(1, {"text": "a"})]
    assert list(read_file(tmp_path / f"a.csv{suffix}", ReadOptions())) == [DataRow(2, {"text": "a"})]


def test_a_name_that_promises_compression_may_lie(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    assert list(read_file(tmp_path / "a.jsonl.gz", ReadOptions())) == [DataRow(1, {"text": "a"})]


@pytest.mark.parametrize("suffix", PACKERS)
def test_a_file_that_is_cut_off_or_damaged_is_refused_after_its_last_row(tmp_path: Path, suffix: str) -> None:
    # Rows that do not compress, so that the damage comes after some of them.
    rows = b"".join(b'{"text": "%s"}\n' % number.to_bytes(200, "big").hex().encode() for number in range(2000))
    packed = PACKERS[suffix](rows)
    path = tmp_path / f"a.jsonl{suffix}"
    for damaged in (packed[: len(packed) // 2], packed[:-10], packed[: len(packed) // 2] + bytes(len(packed) // 2)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot be read.*(whole|anew)"):
            list(read_file(path, ReadOptions()))


def test_the_row_after_which_a_file_breaks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(ROWS) + b"garbage that is no gzip member")
    rows = read_file(path, ReadOptions())
    for _ in range(2000):
        next(rows)
    with pytest.raises(DataError, match="after row 2,000"):
        next(rows)


def test_nothing_packed_is_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match="empty once it is unpacked"):
        read_file(tmp_path / "a.jsonl.gz", ReadOptions())


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_one_bad_row_in_little_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.jsonl{suffix}"
    block = PACKERS[suffix](bytes(2**24))
    path.write_bytes(PACKERS[suffix](b'{"text": "') + block * 32 + PACKERS[suffix](b'"}\n{"text": "b"}\n'))
    script = (
        "import resource, sys; from pathlib import Path; import pyarrow;"
        "from fedmoe.datasets.readers.data_file import ReadOptions, read_file;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "print([type(row).__name__ for row in read_file(Path(sys.argv[1]), ReadOptions(None, 2**20))]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert done.stdout.split("\n")[:2] == ["['BadRow', 'DataRow']", "True"], done.stderr


@pytest.mark.skipif(shutil.which("gunzip") is None, reason="needs gunzip")
def test_columns_inside_gzip_are_read_once_unpacked_as_the_message_says(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "a.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataError) as refused:
        read_file(tmp_path / "a.parquet.gz", ReadOptions())
    command = str(refused.value).rpartition("unpack it first: ")[2]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert list(read_file(tmp_path / "a.parquet", ReadOptions())) == [DataRow(1, {"text": "a"})]


def test_zstd_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(ROWS))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"fedmoe\[worker\].*unzstd a\.jsonl\.zst"):
        read_file(tmp_path / "a.jsonl.zst", ReadOptions())


def test_a_bad_line_keeps_its_number(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n\nno\n'))
    _, bad = read_file(tmp_path / "a.jsonl.gz", ReadOptions())
    assert isinstance(bad, BadRow)
    assert bad.line == 3
