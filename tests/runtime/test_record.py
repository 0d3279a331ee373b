import json
import os
import threading
from pathlib import Path

import pytest

from fedmoe.runtime.records import RecordWriter, read_records


def test_records_come_back_in_order_with_kind_and_time(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "new" / "metrics.jsonl", clock=lambda: 12.34567)
    writer.write("step", step=1, loss=0.5, worker="w1", ok=True, nothing=None)
    writer.write("push", version=2)
    writer.close()
    first, second = read_records(tmp_path / "new" / "metrics.jsonl")
    assert first == {"at": 12.346, "kind": "step", "step": 1, "loss": 0.5, "worker": "w1", "ok": True, "nothing": None}
    assert (second["kind"], second["version"]) == ("push", 2)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_has_no_word_for_become_null(number: float, tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "metrics.jsonl")
    writer.write("step", loss=number)
    writer.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None


def test_a_restart_appends(tmp_path: Path) -> None:
    for step in range(3):
        writer = RecordWriter(tmp_path / "metrics.jsonl")
        writer.write("step", step=step)
        writer.close()
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [0, 1, 2]


def test_a_line_still_being_written_is_left_out_and_one_cut_by_a_crash_spoils_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n{"step": 1, "lo')
    assert [record["step"] for record in read_records(file)] == [0]
    writer = RecordWriter(file)
    writer.write("step", step=2)
    writer.close()
    assert [record["step"] for record in read_records(file)] == [0, 2]
    file.write_bytes(b'\xff\xfe\n[1]\n"text"\n{"step": 3}\n')
    assert list(read_records(file)) == [{"step": 3}]


def test_writers_in_parallel_never_mix_their_lines(tmp_path: Path) -> None:
    def write(name: str) -> None:
        writer = RecordWriter(tmp_path / "metrics.jsonl")
        for number in range(200):
            writer.write("step", worker=name * 50, number=number)
        writer.close()

    threads = [threading.Thread(target=write, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = list(read_records(tmp_path / "metrics.jsonl"))
    for name in "abc":
        assert [r["number"] for r in records if r["worker"] == name * 50] == list(range(200))


def test_a_disk_that_takes_half_a_record_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RecordWriter(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(os, "write", lambda descriptor, data: len(data) // 2)
    with pytest.raises(OSError, match="No space left"):
        writer.write("step", step=1)
    monkeypatch.undo()
    writer.close()


def test_records_are_for_the_user_only(tmp_path: Path) -> None:
    RecordWriter(tmp_path / "metrics.jsonl").close()
    assert (tmp_path / "metrics.jsonl").stat().st_mode & 0o077 == 0


def test_many_records_go_in_one_write_with_the_times_they_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([1.0, 2.0])
    writer = RecordWriter(tmp_path / "metrics.jsonl", clock=lambda: next(times))
    made = [writer.stamped("step", {"step": number, "loss": float("nan")}) for number in range(2)]
    writes: list[bytes] = []
    real = os.write

    def write(descriptor: int, data: bytes) -> int:
        writes.append(data)
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    writer.write_many(made)
    monkeypatch.undo()
    assert len(writes) == 1
    assert writer.sync() == (tmp_path / "metrics.jsonl").stat().st_size == len(writes[0])
    writer.close()
    assert [(record["at"], record["step"], record["loss"]) for record in read_records(tmp_path / "metrics.jsonl")] == [
        (1.0, 0, None),
        (2.0, 1, None),
    ]
