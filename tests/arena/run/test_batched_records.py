"""Records in batches (E20) and cut at a resume."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path

import forks
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fedmoe.arena.run.batched_records import BatchedRecords, truncate_records
from fedmoe.runtime.records import RecordWriter, read_records


def numbers(file: Path) -> list[object]:
    return [record["number"] for record in read_records(file)]


def test_records_wait_for_the_end_of_the_iteration_and_go_in_one_write_e20(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metrics.jsonl"
    writes = 0
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        nonlocal writes
        writes += 1
        return real(descriptor, data)

    with BatchedRecords(RecordWriter(file)) as records:
        monkeypatch.setattr(os, "write", write)
        for iteration in range(3):
            for number in range(20):
                records.write("policy", iteration=iteration, number=number)
            assert len(numbers(file)) == 20 * iteration
            records.flush()
            records.flush()
            assert len(numbers(file)) == 20 * (iteration + 1)
        assert writes == 3


def test_leaving_writes_what_waits_also_after_an_error(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with contextlib.suppress(RuntimeError), BatchedRecords(RecordWriter(file)) as records:
        records.write("policy", number=1)
        raise RuntimeError("boom")
    assert numbers(file) == [1]


def test_a_run_that_never_flushes_does_not_grow_for_ever(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with BatchedRecords(RecordWriter(file), most=10) as records:
        for number in range(25):
            records.write("policy", number=number)
        assert numbers(file) == list(range(20))


def test_threads_share_one_batch(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with BatchedRecords(RecordWriter(file), most=7) as records:

        def write() -> None:
            for number in range(100):
                records.write("policy", number=number)

        threads = [threading.Thread(target=write) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(map(int, map(str, numbers(file)))) == sorted([*range(100)] * 4)


def test_a_full_disk_is_an_error_and_a_second_try_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "metrics.jsonl"
    records = BatchedRecords(RecordWriter(file))
    records.write("policy", number=1)
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:5]))
    with pytest.raises(OSError, match="No space left"):
        records.flush()
    monkeypatch.undo()
    records.close()
    assert file.read_bytes() == b'{"at"'


@given(counts=st.lists(st.integers(1, 5), min_size=1, max_size=6), data=st.data())
def test_a_resumed_run_has_every_iteration_once(
    counts: list[int], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    positions = [0]
    with BatchedRecords(RecordWriter(file)) as records:
        for iteration, count in enumerate(counts):
            for _ in range(count):
                records.write("policy", number=iteration)
            positions.append(records.sync())
    resumed = data.draw(st.integers(0, len(counts)))
    removed = truncate_records(file, positions[resumed])
    assert removed == positions[-1] - positions[resumed]
    with BatchedRecords(RecordWriter(file)) as records:
        for iteration in range(resumed, len(counts)):
            for _ in range(counts[iteration]):
                records.write("policy", number=iteration)
    assert numbers(file) == [iteration for iteration, count in enumerate(counts) for _ in range(count)]


def test_a_file_shorter_than_the_checkpoint_says_is_left_and_logged(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"number": 1}\n')
    with capture_logs() as lines:
        assert truncate_records(file, 100) == 0
        assert truncate_records(tmp_path / "missing", 5) == 0
    assert [(line["event"], line["bytes"], line["expected"]) for line in lines] == [
        ("records_shorter_than_checkpoint", 14, 100),
        ("records_shorter_than_checkpoint", 0, 5),
    ]
    assert numbers(file) == [1]


KILLED = """
import os, signal, sys
from pathlib import Path
from fedmoe.arena.run.batched_records import BatchedRecords
from fedmoe.runtime.records import RecordWriter
with BatchedRecords(RecordWriter(Path(sys.argv[1]))) as records:
    records.write("policy", number=1)
    records.flush()
    records.write("policy", number=2)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_loses_only_the_iteration_under_way(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    done = forks.run("-c", KILLED, str(file))
    assert done.returncode == -signal.SIGKILL
    assert numbers(file) == [1]
