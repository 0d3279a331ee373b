"""Trackers: Trackio, Weights & Biases and MLflow get the numbers of records, from a thread of their own."""

from __future__ import annotations

import os
import queue
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from fedmoe.runtime.errors import ExpectedError
from fedmoe.runtime.records import Record
from fedmoe.runtime.sinks import StepCounter, curve_name, curve_values

#: Names of trackers, for arena runs and workers.
REPORT_TO = "FEDMOE_REPORT_TO"
_PROJECT = "fedmoe"
# Records that wait for a tracker that is slow, and how long it is waited for at the end.
_MOST_WAITING = 10_000
_SECONDS_TO_END = 60.0


class TrackerError(ExpectedError):
    """A tracker is not known, not installed, or cannot be opened; the message says what to do."""


class TrackerNameError(TrackerError, ValueError):
    """A name that is no tracker's."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """An open run of a tracker: `log` takes values by name at a step, `finish` makes them durable."""

    log: Callable[[dict[str, float], int], None]
    finish: Callable[[], None]


class Tracker:
    """Sends every curve of a record to a tracker, as `kind/field/policy`; a `Sink`.

    What is slow or away cannot hold up a run. Errors are raised by the next call.
    """

    def __init__(self, name: str, run: TrackedRun) -> None:
        self._name, self._run = name, run
        self._steps = StepCounter()
        self._waiting: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(_MOST_WAITING)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._send, name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Queue the finite numbers of one record."""
        step = self._steps.of(record)
        values = {curve_name(kind, field, labels): value for kind, field, labels, value in curve_values(record)}
        if values:
            self._put((values, step))

    def close(self) -> None:
        """Send what waits, and end the tracker's run."""
        self._put(None)
        self._thread.join(_SECONDS_TO_END)
        self._raise()
        if self._thread.is_alive():
            raise TimeoutError(f"{self._name} did not take everything within {_SECONDS_TO_END:g} s")

    def _put(self, item: tuple[dict[str, float], int] | None) -> None:
        self._raise()
        try:
            self._waiting.put_nowait(item)
        except queue.Full:
            raise TimeoutError(f"{self._name} is too slow: {_MOST_WAITING} records wait") from None

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _send(self) -> None:
        try:
            while (item := self._waiting.get()) is not None:
                self._run.log(*item)
            # Standard output may belong to a JSON document.
            with redirect_stdout(sys.stderr):
                self._run.finish()
        except Exception as error:
            self._error = error


def usable_trackers(names: str) -> str:
    """`names` as they are if all are trackers; raises ValueError, which names those that there are."""
    _chosen(names)
    return names


def _chosen(names: str) -> list[str]:
    chosen = list(dict.fromkeys(name for name in re.split(r"[,\s]+", names) if name))
    if unknown := [name for name in chosen if name not in _OPENERS]:
        raise TrackerNameError(f"{', '.join(unknown)}: no such tracker to report to; there are {', '.join(_OPENERS)}")
    return chosen


def open_trackers(names: str, run: str, folder: Path) -> list[Tracker]:
    """Trackers for a run of this name; `names` are trackio, wandb, mlflow, with commas between them; empty for none.

    What they keep on this machine lies in `folder`, unless their own environment variables name another place. Raises
    `TrackerError`.
    """
    with ExitStack() as opened:
        trackers = []
        for name in _chosen(names):
            trackers.append(Tracker(name, _opened(name, run, folder)))
            opened.callback(trackers[-1].close)
        opened.pop_all()
    return trackers


def _opened(name: str, run: str, folder: Path) -> TrackedRun:
    try:
        with redirect_stdout(sys.stderr):
            return _OPENERS[name](run, folder)
    except ModuleNotFoundError as error:
        raise TrackerError(f"{error.name} is not installed; run: pip install 'fedmoe[{name}]'") from error
    except Exception as error:
        raise TrackerError(f"{name} cannot be opened: {' '.join(str(error).split())}") from error


def _trackio(run: str, folder: Path) -> TrackedRun:
    # Read when the module is loaded.
    os.environ.setdefault("TRACKIO_DIR", str(folder / "trackio"))
    import trackio

    opened = trackio.init(project=os.environ.get("TRACKIO_PROJECT") or _PROJECT, name=run)
    return TrackedRun(lambda values, step: opened.log(values, step=step), opened.finish)


def _wandb(run: str, folder: Path) -> TrackedRun:
    import wandb

    opened = wandb.init(project=os.environ.get("WANDB_PROJECT") or _PROJECT, name=run, dir=str(folder))
    # Its own counter drops what comes with an earlier step.
    opened.define_metric("*", step_metric="step")
    return TrackedRun(lambda values, step: opened.log({**values, "step": step}), opened.finish)


def _mlflow(run: str, folder: Path) -> TrackedRun:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    client = MlflowClient(tracking_uri=store)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
    experiment = client.get_experiment_by_name(name)
    number = experiment.experiment_id if experiment is not None else client.create_experiment(name)
    opened = client.create_run(number, run_name=run).info.run_id

    def log(values: dict[str, float], step: int) -> None:
        at = int(time.time() * 1000)
        metrics = [Metric(re.sub(r"[^\w\-. /]", "_", key, flags=re.ASCII), v, at, step) for key, v in values.items()]
        client.log_batch(opened, metrics=metrics)

    return TrackedRun(log, lambda: client.set_terminated(opened))


_OPENERS: Mapping[str, Callable[[str, Path], TrackedRun]] = {"trackio": _trackio, "wandb": _wandb, "mlflow": _mlflow}
