"""Sinks: records shown elsewhere as they are kept, such as live views and trackers, which cannot disturb a run.

A sink that cannot be opened is an error; one that fails later is reported once and then left out, since showing a run
must not end it.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import structlog

from fedmoe.runtime.records import Record, Recorder, RecordValue

#: Kinds of records whose numbers are curves: of the arena, and of a federation's worker.
_CURVES = (
    *("policy", "team", "credit", "rating", "evaluation", "timing", "system"),
    *("step", "held_out", "push"),
)
#: What tells several curves of a kind apart.
LABEL_NAMES = {**dict.fromkeys(("policy", "credit", "rating"), ("policy",)), "evaluation": ("policy", "opponent")}
#: Fields that say what a record is about and are no curves themselves.
_LABELS = ("at", "iteration", "step", "sequence", "policy", "mode", "opponent", "sample")


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


class StepCounter:
    """Where records lie: at their iteration or step, those without at the newest one seen."""

    def __init__(self) -> None:
        self._step = 0

    def of(self, record: Record) -> int:
        for name in ("iteration", "step"):
            value = record.get(name)
            if isinstance(value, int | float):
                self._step = int(value)
        return self._step


def curve_values(record: Record) -> Iterator[tuple[str, str, tuple[str, ...], float]]:
    """Kind, field, labels and value of every finite number of a record that is a curve."""
    kind = str(record["kind"])
    if kind not in _CURVES:
        return
    labels = tuple(str(record.get(name) or "") for name in LABEL_NAMES.get(kind, ()))
    for field, value in record.items():
        if field not in _LABELS and isinstance(value, int | float) and math.isfinite(value):
            yield kind, field, labels, float(value)


def curve_name(kind: str, field: str, labels: Sequence[str]) -> str:
    """A curve's name for viewers that group by slashes: `policy/reward/solver`."""
    return "/".join(filter(None, (kind, field, *labels)))
