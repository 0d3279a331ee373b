"""Monitors of an arena run: the terminal, TensorBoard, Prometheus, and samples of the machine's load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console

from fedmoe.arena.run.batched_records import BatchedRecords
from fedmoe.monitor.exporters import PrometheusSink, Sink, TensorBoardSink, WatchedWriter
from fedmoe.monitor.system import sampled_system
from fedmoe.monitor.terminal import TerminalView


class ArenaWatch:
    """Opens all watchers for a run and closes them after it; one that cannot be opened is an error."""

    def __init__(self, iterations: int, prometheus_port: int | None, tensorboard: bool) -> None:
        self._iterations = iterations
        self._port = prometheus_port
        self._tensorboard = tensorboard

    @contextmanager
    def __call__(self, records: BatchedRecords, folder: Path, limit: Callable[[], int]) -> Iterator[WatchedWriter]:
        """The writer to use instead of `records`."""
        with ExitStack() as stack:
            sinks: list[Sink] = [stack.enter_context(TerminalView(Console(), self._iterations))]
            if self._tensorboard:
                sinks.append(TensorBoardSink(folder / "tensorboard"))
            if self._port is not None:
                sinks.append(PrometheusSink(self._port))
            writer = WatchedWriter(records, sinks)
            stack.callback(writer.close)
            stack.enter_context(sampled_system(writer, folder, memory_limit=limit))
            yield writer
