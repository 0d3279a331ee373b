"""TensorBoard and Prometheus get the numbers of the records, and cannot disturb a run once it goes (E23)."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from fedmoe.monitor.exporters import PrometheusSink, TensorBoardSink
from fedmoe.monitor.sample_records import sample_records
from fedmoe.runtime.records import Record, RecordValue, RecordWriter, read_records
from fedmoe.runtime.sinks import WatchedWriter


@pytest.fixture
def prometheus() -> Iterator[PrometheusSink]:
    sink = PrometheusSink(port=0)
    yield sink
    sink.close()


def served(sink: PrometheusSink) -> list[str]:
    with urllib.request.urlopen(f"http://127.0.0.1:{sink.port}/metrics", timeout=10) as answer:
        return str(answer.read(), "utf-8").splitlines()


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


@pytest.mark.parametrize(("value", "shown"), [(1e300, math.inf), (-1e300, -math.inf), (3.5, 3.5), (2**40, 2.0**40)])
def test_a_number_beyond_single_precision_does_not_end_a_run(tmp_path: Path, value: float, shown: float) -> None:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    sink = TensorBoardSink(tmp_path)
    sink.write({"at": 7.5, "kind": "team", "iteration": 3, "score": value})
    (path,) = tmp_path.iterdir()
    head, event = (Event.FromString(data) for data in RawEventFileLoader(str(path)).Load())
    sink.close()
    assert head.file_version == "brain.Event:2"
    assert (event.wall_time, event.step) == (7.5, 3)
    assert [(found.tag, found.simple_value) for found in event.summary.value] == [("team/score", shown)]


def test_two_event_files_in_one_folder_do_not_meet(tmp_path: Path) -> None:
    first, second = TensorBoardSink(tmp_path), TensorBoardSink(tmp_path)
    first.close()
    second.close()
    assert len(list(tmp_path.iterdir())) == 2


def test_writing_for_tensorboard_loads_neither_tensorflow_nor_torch(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from fedmoe.monitor.exporters import TensorBoardSink\n"
    code += "TensorBoardSink(Path(sys.argv[1])).close(); print({'tensorflow', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


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
        def write(self, kind: str, **values: RecordValue) -> None:
            raise OSError("no room")

        def close(self) -> None: ...

    kept = Kept()
    with pytest.raises(OSError, match="no room"):
        WatchedWriter(Full(), [kept]).write("team")
    assert kept.records == []
