"""Live export of records to the terminal, TensorBoard files, Prometheus gauges and trackers."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from fedmoe.monitor.system import sampled_system
from fedmoe.monitor.terminal import TerminalView
from fedmoe.runtime.records import Record, Recorder
from fedmoe.runtime.sinks import LABEL_NAMES, Sink, StepCounter, WatchedWriter, curve_name, curve_values
from fedmoe.runtime.trackers import open_trackers

if TYPE_CHECKING:
    from prometheus_client import Gauge


@contextmanager
def all_monitors(
    records: Recorder,
    folder: Path,
    limit: Callable[[], int],
    iterations: int,
    prometheus_port: int | None,
    tensorboard: bool,
    report_to: str = "",
) -> Iterator[WatchedWriter]:
    """The writer to use instead of `records` in a run of so many iterations; one that cannot be opened is an error.

    Shown on the terminal, and by TensorBoard, Prometheus and the trackers of `report_to` where asked for, with samples
    of the machine's load.
    """
    with ExitStack() as stack:
        sinks: list[Sink] = [stack.enter_context(TerminalView(Console(), iterations))]
        with ExitStack() as opened:  # closes what is open where a later one cannot be opened
            if tensorboard:
                sinks.append(TensorBoardSink(folder / "tensorboard"))
                opened.callback(sinks[-1].close)
            if prometheus_port is not None:
                sinks.append(PrometheusSink(prometheus_port))
                opened.callback(sinks[-1].close)
            sinks += open_trackers(report_to, folder.absolute().name, folder)
            opened.pop_all()
        writer = WatchedWriter(records, sinks)
        stack.callback(writer.close)
        stack.enter_context(sampled_system(writer, folder, memory_limit=limit))
        yield writer


class TensorBoardSink:
    """Writes every number of a record as a curve `kind/field/policy` into an event file in `folder`.

    Steps are iterations; `system` records, which have none, are placed at the newest iteration seen. Values are single
    precision, and infinite beyond it. Raises OSError when the file cannot be made, ModuleNotFoundError without
    tensorboard, of which the record format and the messages are used: they load neither TensorFlow nor torch.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # TensorBoard finds a file by its name; unbuffered, so that values can be read as soon as they are added.
        name = f"events.out.tfevents.{int(now):010d}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = RecordWriter((folder / name).open("xb", buffering=0))
        self._file.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
        self._steps = StepCounter()

    def write(self, record: Record) -> None:
        """Append the numbers of one record."""
        event = self._event(wall_time=float(str(record["at"])), step=self._steps.of(record))
        for kind, field, labels, number in curve_values(record):
            event.summary.value.add(tag=curve_name(kind, field, labels), simple_value=number)
        if event.summary.value:
            self._file.write(event.SerializeToString())

    def close(self) -> None:
        """Release the file."""
        self._file.close()


class PrometheusSink:
    """Serves the newest number of every curve as a gauge `fedmoe_arena_KIND_FIELD{policy=...,opponent=...}`.

    Listens on `address` (this machine only, unless another is given); port 0 takes a free one, `port` says which. The
    registry is its own. Raises OSError when the port is taken, ModuleNotFoundError without prometheus-client.
    """

    def __init__(self, port: int, address: str = "127.0.0.1") -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self._registry = CollectorRegistry()
        self._gauges: dict[str, Gauge] = {}
        self._server, self._thread = start_http_server(port, addr=address, registry=self._registry)
        self.port = int(self._server.server_port)

    def write(self, record: Record) -> None:
        """Set the gauges of one record."""
        iteration = record.get("iteration")
        if record["kind"] == "policy" and isinstance(iteration, int | float):
            self._gauge("run", "iteration", ()).set(float(iteration))
        for kind, field, labels, value in curve_values(record):
            gauge = self._gauge(kind, field, LABEL_NAMES.get(kind, ()))
            (gauge.labels(*labels) if labels else gauge).set(value)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _gauge(self, kind: str, field: str, labels: Sequence[str]) -> Gauge:
        from prometheus_client import Gauge

        name = f"fedmoe_arena_{kind}_{field}"
        if name not in self._gauges:
            text = f"{field.replace('_', ' ')} of the newest {kind} record; docs/metrics.md has formula and unit"
            self._gauges[name] = Gauge(name, text, labels, registry=self._registry)
        return self._gauges[name]
