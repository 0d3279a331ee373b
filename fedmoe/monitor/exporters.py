"""Live export of records to the terminal, TensorBoard files, Prometheus gauges, or any other sink.

A monitor that cannot be opened is an error; one that fails later is reported once and then left out, since showing a
run must not end it.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import structlog
from rich.console import Console

from fedmoe.monitor.system import sampled_system
from fedmoe.monitor.terminal import TerminalView
from fedmoe.runtime.records import Record, Recorder, RecordValue

if TYPE_CHECKING:
    from prometheus_client import Gauge

#: Kinds of records whose numbers are curves.
_CURVES = ("policy", "team", "credit", "rating", "evaluation", "timing", "system")
#: What tells several curves of a kind apart.
_LABEL_NAMES = {**dict.fromkeys(("policy", "credit", "rating"), ("policy",)), "evaluation": ("policy", "opponent")}
#: Fields that say what a record is about and are no curves themselves.
_LABELS = ("at", "iteration", "policy", "mode", "opponent", "sample")


class Sink(Protocol):
    """Takes records one by one."""

    def write(self, record: Record) -> None:
        """Show one record."""
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


class WatchedWriter:
    """Keeps every record first, then shows it to all sinks; takes the place of a `RecordWriter`, from any thread.

    What goes wrong while keeping is raised, as ever. A sink that fails is logged (`monitor_failed`) and left out.
    """

    def __init__(self, writer: Recorder, sinks: Sequence[Sink], clock: Callable[[], float] = time.time) -> None:
        self._writer = writer
        self._sinks = list(sinks)
        self._clock = clock
        # Sinks are not asked to bear several threads; the sampler of the system has its own.
        self._lock = threading.Lock()

    def write(self, kind: str, **values: RecordValue) -> None:
        """Keep a record, then show it."""
        self._writer.write(kind, **values)
        record: Record = {"at": round(self._clock(), 3), "kind": kind, **values}
        with self._lock:
            self._each(lambda sink: sink.write(record))

    def close(self) -> None:
        """Close the writer and all sinks."""
        self._writer.close()
        with self._lock:
            self._each(lambda sink: sink.close())

    def _each(self, act: Callable[[Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                act(sink)
            except Exception as error:
                self._sinks.remove(sink)
                name = type(sink).__name__
                structlog.get_logger().warning("monitor_failed", monitor=name, reason=str(error), left_out=True)


@contextmanager
def all_monitors(
    records: Recorder,
    folder: Path,
    limit: Callable[[], int],
    iterations: int,
    prometheus_port: int | None,
    tensorboard: bool,
) -> Iterator[WatchedWriter]:
    """The writer to use instead of `records` in a run of so many iterations; one that cannot be opened is an error.

    Shown on the terminal, and by TensorBoard and Prometheus where asked for, with samples of the machine's load.
    """
    with ExitStack() as stack:
        sinks: list[Sink] = [stack.enter_context(TerminalView(Console(), iterations))]
        if tensorboard:
            sinks.append(TensorBoardSink(folder / "tensorboard"))
        if prometheus_port is not None:
            sinks.append(PrometheusSink(prometheus_port))
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
        self._step = 0

    def write(self, record: Record) -> None:
        """Append the numbers of one record."""
        iteration = record.get("iteration")
        if isinstance(iteration, int | float):
            self._step = int(iteration)
        event = self._event(wall_time=float(str(record["at"])), step=self._step)
        for kind, field, labels, number in _values(record):
            event.summary.value.add(tag="/".join(filter(None, (kind, field, *labels))), simple_value=number)
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
        for kind, field, labels, value in _values(record):
            gauge = self._gauge(kind, field, _LABEL_NAMES.get(kind, ()))
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


def _values(record: Record) -> Iterator[tuple[str, str, tuple[str, ...], float]]:
    """Kind, field, labels and value of every number of a record that is a curve."""
    kind = str(record["kind"])
    if kind not in _CURVES:
        return
    labels = tuple(str(record.get(name) or "") for name in _LABEL_NAMES.get(kind, ()))
    for field, value in record.items():
        if field not in _LABELS and isinstance(value, int | float) and math.isfinite(value):
            yield kind, field, labels, float(value)
