"""TensorBoard and Prometheus get the numbers of the records, and cannot disturb a run once it goes (E23)."""

from __future__ import annotations

import math
import socket
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from fedmoe.monitor.event_file import EventFile, crc32c, event, frame, masked
from fedmoe.monitor.exporters import PrometheusSink, TensorBoardSink, WatchedWriter
from fedmoe.monitor.sample_records import sample_records
from fedmoe.runtime.records import Record, RecordWriter, Value, read_records


@pytest.fixture
def prometheus() -> Iterator[PrometheusSink]:
    sink = PrometheusSink(port=0)
    yield sink
    sink.close()


def served(sink: PrometheusSink) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
        return str(answer.read(), "utf-8").splitlines()


@pytest.mark.parametrize(
    ("data", "expected"),
    [(b"123456789", 0xE3069283), (bytes(32), 0x8A9136AA), (b"\xff" * 32, 0x62A8AB43), (bytes(range(32)), 0x46DD794E)],
)
def test_the_checksum_is_the_standards(data: bytes, expected: int) -> None:
    """RFC 3720, B.4."""
    assert crc32c(data) == expected


def test_tensorboard_reads_the_files_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    records = sample_records(2, 6)
    sink = TensorBoardSink(tmp_path / "tb")
    for record in records:
        sink.write(record)
    sink.close()
    (path,) = (tmp_path / "tb").iterdir()
    read: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for found in EventFileLoader(str(path)).Load():
        for value in found.summary.value:
            number = value.simple_value or (value.tensor.float_val[0] if value.tensor.float_val else 0.0)
            read[value.tag].append((found.step, number))
    rewards = [r["reward"] for r in records if r["kind"] == "policy" and r["policy"] == "solver"]
    assert [step for step, _ in read["policy/reward/solver"]] == list(range(6))
    assert [value for _, value in read["policy/reward/solver"]] == pytest.approx(rewards, rel=1e-6)
    assert {"team/cooperation", "rating/mu/checker", "system/cpu_percent", "timing/tokens_per_second"} <= set(read)
    assert "evaluation/score/solver/base model" in read
    assert not [tag for tag in read if "sample" in tag or "iteration/" in tag]


@given(st.floats(0, 4e9), st.integers(-(2**63), 2**63 - 1), st.dictionaries(st.text(max_size=9), st.floats(width=32)))
def test_events_are_the_messages_tensorboard_defines(at: float, step: int, scalars: dict[str, float]) -> None:
    from tensorboard.compat.proto.event_pb2 import Event

    read = Event.FromString(event(at, step, scalars))
    assert (read.wall_time, read.step) == (at, step)
    assert {value.tag for value in read.summary.value} == set(scalars)
    for value in read.summary.value:
        assert value.simple_value == scalars[value.tag] or math.isnan(scalars[value.tag])


def test_a_frame_carries_length_and_both_checksums() -> None:
    whole = frame(b"abc")
    assert int.from_bytes(whole[:8], "little") == 3
    assert int.from_bytes(whole[8:12], "little") == masked(whole[:8])
    assert whole[12:15] == b"abc"
    assert int.from_bytes(whole[15:], "little") == masked(b"abc")


def test_two_event_files_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    first, second = EventFile(tmp_path), EventFile(tmp_path)
    first.close()
    second.close()
    assert len(list(tmp_path.iterdir())) == 2


def test_prometheus_serves_the_newest_number(prometheus: PrometheusSink) -> None:
    head: Record = {"at": 1.0, "kind": "policy", "policy": "a", "mode": "m"}
    prometheus.write({**head, "iteration": 3, "reward": 0.25, "kl": None})
    prometheus.write({**head, "iteration": 4, "reward": 0.5})
    prometheus.write({"at": 1.0, "kind": "team", "iteration": 4, "completion": 1.0})
    evaluation: Record = {"kind": "evaluation", "policy": "a", "opponent": "base", "score": 0.75}
    prometheus.write({"at": 1.0, "iteration": 4, **evaluation})
    prometheus.write({"at": 1.0, "kind": "run", "task": "t", "seed": 3})
    lines = served(prometheus)
    assert 'fedmoe_arena_policy_reward{policy="a"} 0.5' in lines
    assert "fedmoe_arena_team_completion 1.0" in lines
    assert 'fedmoe_arena_evaluation_score{opponent="base",policy="a"} 0.75' in lines
    assert "fedmoe_arena_run_iteration 4.0" in lines
    assert not [line for line in lines if "seed" in line or "_kl" in line or line.startswith("python_")]


def test_all_records_of_a_run_fit_prometheus(prometheus: PrometheusSink) -> None:
    for record in sample_records(3, 12):
        prometheus.write(record)
    assert len([line for line in served(prometheus) if line.startswith("fedmoe_arena_")]) > 80


def test_prometheus_listens_on_this_machine_only(prometheus: PrometheusSink) -> None:
    assert prometheus._server.server_address[0] == "127.0.0.1"


def test_a_monitor_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OSError, match="in use"):
        PrometheusSink(taken.getsockname()[1])
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        TensorBoardSink(tmp_path / "file" / "tb")


class Broken:
    """Fails from its second record on."""

    def __init__(self) -> None:
        self.asked = 0

    def write(self, record: Record) -> None:
        self.asked += 1
        if self.asked > 1:
            raise ConnectionError("gone")

    def close(self) -> None:
        raise AssertionError("a monitor that failed is not asked again")


class Kept:
    def __init__(self) -> None:
        self.records: list[Record] = []
        self.closed = False

    def write(self, record: Record) -> None:
        self.records.append(record)

    def close(self) -> None:
        self.closed = True


def test_a_monitor_that_fails_later_is_said_once_and_left_out(tmp_path: Path) -> None:
    broken, kept = Broken(), Kept()
    with capture_logs() as logs:
        writer = WatchedWriter(RecordWriter(tmp_path / "metrics.jsonl"), [broken, kept])
        for iteration in range(5):
            writer.write("team", iteration=iteration)
        writer.close()
    assert [(log["event"], log["monitor"], log["reason"]) for log in logs] == [("monitor_failed", "Broken", "gone")]
    assert broken.asked == 2
    assert len(kept.records) == 5
    assert kept.closed
    assert len(list(read_records(tmp_path / "metrics.jsonl"))) == 5


def test_monitors_see_what_is_kept(tmp_path: Path) -> None:
    kept = Kept()
    writer = WatchedWriter(RecordWriter(tmp_path / "m.jsonl", clock=lambda: 7.0), [kept], clock=lambda: 7.0)
    writer.write("policy", policy="a", reward=0.5)
    writer.close()
    assert kept.records == list(read_records(tmp_path / "m.jsonl"))


def test_what_goes_wrong_while_keeping_is_raised() -> None:
    class Full:
        def write(self, kind: str, **values: Value) -> None:
            raise OSError("no room")

        def close(self) -> None: ...

    kept = Kept()
    with pytest.raises(OSError, match="no room"):
        WatchedWriter(Full(), [kept]).write("team")
    assert kept.records == []
