"""The log files of a run, one line an event: `logs/training_runner.log` and `logs/training.log`.

The first tells the life of the process: everything logged through structlog (start, resources, checkpoints, memory,
end) and warnings of other libraries. The second tells the training: iterations and decisions. Both are rotated by size.
"""

from __future__ import annotations

import json
import logging
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

import structlog

RUNNER_LOG = "training_runner.log"
TRAINING_LOG = "training.log"
_FOLDER = "logs"
_MOST_BYTES = 10 << 20
_KEPT = 3
_PLAIN = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f]+")
_LINE_ENDS = re.compile(r"[\x7f-\x9f\u2028\u2029]")  # JSON leaves them, but some readers begin a new line there
# Loggers that warnings reach the file from. transformers does not hand its own on to the root logger.
_SOURCES = (None, "transformers")
_NAMED_FIRST = ("timestamp", "level", "event")

EventDict = structlog.typing.EventDict


@dataclass(frozen=True)
class RunLogs:
    """The loggers of a run, used as `logs.training.info("iteration", number=3, reward=0.5)`.

    `runner` also writes where the process logs anyway; `training` writes to its file only.
    """

    runner: structlog.typing.FilteringBoundLogger
    training: structlog.typing.FilteringBoundLogger


def log_files(run_folder: Path) -> dict[str, Path]:
    """Name within the run folder -> the log files that are there."""
    names = (f"{_FOLDER}/{name}" for name in (RUNNER_LOG, TRAINING_LOG))
    return {name: run_folder / name for name in names if (run_folder / name).is_file()}


@contextmanager
def run_logs(run_folder: Path, most_bytes: int = _MOST_BYTES, kept: int = _KEPT) -> Iterator[RunLogs]:
    """Write the logs of a run while inside; appends to those of an earlier start.

    Each file is begun anew at `most_bytes`, `kept` older ones stay beside it (`.1` is the newest). An error that ends
    the run is logged with its traceback. Call `fedmoe.runtime.logs.configure` before, not inside.
    """
    folder = run_folder / _FOLDER
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    runner_file = _handler(folder / RUNNER_LOG, most_bytes, kept)
    training_file = _handler(folder / TRAINING_LOG, most_bytes, kept)
    logs = RunLogs(structlog.get_logger("fedmoe.arena"), _file_logger(training_file))
    # Changed in place: loggers that were used before hold this very list.
    processors = structlog.get_config()["processors"]
    tee = _Tee(runner_file)
    processors.insert(max(len(processors) - 1, 0), tee)
    for source in _SOURCES:
        logging.getLogger(source).addHandler(runner_file)
    try:
        yield logs
    except KeyboardInterrupt:
        logs.runner.warning("run_interrupted")
        raise
    except Exception as error:
        logs.runner.error("run_ended_by_error", error=repr(error), traceback=traceback.format_exc())
        raise
    finally:
        processors.remove(tee)
        for source in _SOURCES:
            logging.getLogger(source).removeHandler(runner_file)
        for handler in (runner_file, training_file):
            handler.close()


class _PrivateFile(RotatingFileHandler):
    """A rotating log that only its owner can read, and that takes each record once."""

    def filter(self, record: logging.LogRecord) -> bool:
        # A record passes here twice where its own logger and the root logger both have this handler.
        again = self.baseFilename in record.__dict__
        record.__dict__[self.baseFilename] = True
        return not again and bool(super().filter(record))

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def _handler(path: Path, most_bytes: int, kept: int) -> RotatingFileHandler:
    handler = _PrivateFile(path, maxBytes=most_bytes, backupCount=kept)
    handler.setLevel(logging.WARNING)  # for the records of other libraries; own lines do not pass through levels
    handler.setFormatter(_ForeignFormatter())
    return handler


class _ForeignFormatter(logging.Formatter):
    """Own lines as they are, records of other libraries in the same form."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == __name__:
            return record.getMessage()
        event: EventDict = {
            "timestamp": _now(),
            "level": record.levelname.lower(),
            "event": record.name,
            "message": super().format(record),
        }
        return line_of(event)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def line_of(event: EventDict) -> str:
    """One event as one line: time, level, name, then `key=value`; values with spaces or quotes as JSON text."""
    first = [_one_line(event.get(name, "-")) for name in _NAMED_FIRST]
    rest = [f"{_one_line(name)}={_one_line(value)}" for name, value in event.items() if name not in _NAMED_FIRST]
    return " ".join([*first, *rest])


def _one_line(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if _PLAIN.fullmatch(text):
        return text
    return _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(text, ensure_ascii=False))


def _write(handler: RotatingFileHandler, event: EventDict) -> None:
    # Straight to the handler, which locks and rotates; a disk that is full is told on standard error, not raised.
    handler.handle(logging.LogRecord(__name__, logging.INFO, "", 0, line_of(event), None, None))


class _Tee:
    """A structlog processor that also writes every event to a file."""

    def __init__(self, handler: RotatingFileHandler) -> None:
        self._handler = handler

    def __call__(self, logger: object, method: str, event: EventDict) -> EventDict:
        _write(
            self._handler,
            structlog.processors.format_exc_info(logger, method, {"level": method, **event, "timestamp": _now()}),
        )
        return event


def _file_logger(handler: RotatingFileHandler) -> structlog.typing.FilteringBoundLogger:
    def write(logger: object, method: str, event: EventDict) -> EventDict:
        _write(handler, {**event, "timestamp": _now()})
        raise structlog.DropEvent

    processors: list[structlog.typing.Processor] = [
        structlog.processors.add_log_level,
        write,
    ]
    wrapper = structlog.make_filtering_bound_logger(logging.INFO)
    logger: structlog.typing.FilteringBoundLogger = structlog.wrap_logger(
        structlog.PrintLogger(), processors=processors, wrapper_class=wrapper
    )
    return logger
