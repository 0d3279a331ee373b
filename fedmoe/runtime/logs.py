"""Logging: readable on a terminal, one JSON object per line elsewhere, and the log files of an arena run.

A run writes one line an event. `logs/training_runner.log` is about the process: everything logged through
structlog (start, resources, checkpoints, memory, end) and warnings of other libraries. `logs/training.log` is about the
training: iterations and decisions. Both are rotated by size.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType
from typing import TextIO, cast

import stamina.instrumentation
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor

from fedmoe.runtime.safe_text import inert

_LOG_FILES = ("logs/training_runner.log", "logs/training.log")
#: A log file begins anew at this size; so many older ones stay beside it (`.1` is the newest).
_ROTATE_BYTES = 10 << 20
_OLDER_FILES = 3
# Loggers that warnings reach a log file from. transformers does not hand its own on to the root logger.
_LIBRARIES = (None, "transformers")
_PLAIN = re.compile(r"[^\s\"'=\\\x00-\x1f\x7f]+")
_LINE_ENDS = re.compile(r"[\x7f-\x9f\u2028\u2029]")  # JSON leaves them, but some readers begin a new line there
_FIRST_FIELDS = ("timestamp", "level", "event")


class _StandardError:
    """Standard error as it is when something is written: it may be exchanged after loggers were made.

    Where it leads nowhere any more (a closed terminal, a reader that left), what is logged is lost and work goes on.
    """

    def write(self, text: str) -> int:
        with suppress(OSError):
            return sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            sys.stderr.flush()


def configure(level: int = logging.INFO) -> None:
    """Set up structlog for this process; writes to standard error, honours NO_COLOR and TERM=dumb."""
    terminal = sys.stderr.isatty()
    colours = terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    renderer: Processor = (
        structlog.dev.ConsoleRenderer(colors=colours) if terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _inert_values,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _StandardError())),
        # Not cached: whoever configures again, or captures what is logged, means every logger.
        cache_logger_on_first_use=False,
    )
    quiet_retries()
    # uvicorn, asyncio and the like speak through logging; only what goes wrong there matters here.
    logging.basicConfig(handlers=[_LibraryRecords()], level=logging.WARNING)


class _LibraryRecords(logging.Handler):
    """What libraries log, as events of this log: a traceback is a value on the same line, not lines of its own."""

    def emit(self, record: logging.LogRecord) -> None:
        values = {"logger": record.name}
        if record.exc_info and record.exc_info[0] is not None:
            values["exception"] = "".join(traceback.format_exception(*record.exc_info))
        structlog.get_logger().log(max(record.levelno, logging.WARNING), record.getMessage().strip(), **values)


def log_uncaught() -> None:
    """Log errors that end this process or one of its threads, and warnings of Python, like everything else.

    For services, whose log is read by programs; a command shows its traceback as Python does.
    """

    def ends_process(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            return
        text = "".join(traceback.format_exception(kind, error, trace))
        structlog.get_logger().critical("uncaught", error=repr(error), exception=text)

    def ends_thread(ending: threading.ExceptHookArgs) -> None:
        text = "".join(traceback.format_exception(ending.exc_type, ending.exc_value, ending.exc_traceback))
        name = ending.thread.name if ending.thread is not None else ""
        structlog.get_logger().critical("uncaught", error=repr(ending.exc_value), thread=name, exception=text)

    if not sys.stderr.isatty():
        sys.excepthook, threading.excepthook = ends_process, ends_thread
        logging.captureWarnings(True)


def _inert_values(_: object, __: str, event: EventDict) -> EventDict:
    """What others wrote (names, messages, paths) reaches no terminal raw, neither now nor when a log is looked at."""
    return {name: inert(value, keep="\n") if isinstance(value, str) else value for name, value in event.items()}


def quiet_retries() -> None:
    """Keep stamina from logging every try: who retries here says so in its own words."""
    stamina.instrumentation.set_on_retry_hooks([])


def warn(event: str, **values: object) -> None:
    """Log a warning; a command that has set up no logs does so first, for standard output is not theirs."""
    if not structlog.is_configured():
        configure()
    structlog.get_logger().warning(event, **values)


@dataclass(frozen=True)
class RunLogs:
    """The loggers of a run, used as `logs.training.info("iteration", number=3, reward=0.5)`.

    `runner` also writes where the process logs anyway; `training` writes to its file only.
    """

    runner: FilteringBoundLogger
    training: FilteringBoundLogger


def log_files(run_folder: Path) -> dict[str, Path]:
    """Name within the run folder -> the log files that are there."""
    return {name: run_folder / name for name in _LOG_FILES if (run_folder / name).is_file()}


@contextmanager
def run_logs(run_folder: Path) -> Iterator[RunLogs]:
    """Write the logs of a run while inside; appends to those of an earlier start.

    An error that ends the run is logged with its traceback. Call `configure` before, not inside.
    """
    (run_folder / "logs").mkdir(parents=True, exist_ok=True, mode=0o700)
    runner_file, training_file = (_LogFile(run_folder / name) for name in _LOG_FILES)
    only_training = structlog.wrap_logger(
        structlog.ReturnLogger(), [training_file], structlog.make_filtering_bound_logger(logging.INFO)
    )
    logs = RunLogs(structlog.get_logger(), only_training)
    # Changed in place: loggers that were used before hold this very list.
    processors = structlog.get_config()["processors"]
    processors.insert(max(len(processors) - 1, 0), runner_file)
    for library in _LIBRARIES:
        logging.getLogger(library).addHandler(runner_file)
    try:
        yield logs
    except KeyboardInterrupt:
        logs.runner.warning("run_interrupted")
        raise
    except Exception as error:
        logs.runner.error("run_ended_by_error", error=repr(error), traceback=traceback.format_exc())
        raise
    finally:
        processors.remove(runner_file)
        for library in _LIBRARIES:
            logging.getLogger(library).removeHandler(runner_file)
        runner_file.close()
        training_file.close()


class LogTail:
    """The newest lines of this process's log about some events, numbered from 0; safe to use from any thread.

    A structlog processor.
    """

    def __init__(self, events: frozenset[str], most: int = 200) -> None:
        self._events = events
        self._lines: deque[str] = deque(maxlen=most)
        self._following = 0
        self._lock = threading.Lock()

    def __call__(self, logger: object, method: str, event: EventDict) -> EventDict:
        if event.get("event") in self._events:
            line = inert(line_of({"level": method, **event}))
            with self._lock:
                self._lines.append(line)
                self._following += 1
        return event

    def since(self, number: int, most: int) -> tuple[int, list[str]]:
        """At most so many lines from this number on, as far as they are kept, and the number of the first of them."""
        with self._lock:
            first = max(number, self._following - len(self._lines))
            start = len(self._lines) - (self._following - first)
            return first, list(self._lines)[start : start + most]


@contextmanager
def log_tail(events: frozenset[str]) -> Iterator[LogTail]:
    """The lines that are logged about these events while inside; call `configure` before."""
    tail = LogTail(events)
    processors = structlog.get_config()["processors"]
    processors.insert(max(len(processors) - 1, 0), tail)
    try:
        yield tail
    finally:
        processors.remove(tail)


class _LogFile(RotatingFileHandler):
    """A log file that only its owner can read: a structlog processor for events, a handler for other libraries."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=_ROTATE_BYTES, backupCount=_OLDER_FILES)
        self.setLevel(logging.WARNING)  # for the records of other libraries; events do not pass through levels

    def __call__(self, logger: object, method: str, event: EventDict) -> EventDict:
        # What another library logs comes through `handle`, and here once more where `_LibraryRecords` passes it on.
        if "logger" not in event:
            whole = structlog.processors.format_exc_info(logger, method, {"level": method, **event, **_now()})
            # Straight to the handler, which locks and rotates; a full disk is reported on standard error, not raised.
            self.handle(logging.LogRecord(__name__, logging.INFO, "", 0, line_of(whole), None, None))
        return event

    def filter(self, record: logging.LogRecord) -> bool:
        # A record passes here twice where its own logger and the root logger both have this handler.
        again = self.baseFilename in record.__dict__
        record.__dict__[self.baseFilename] = True
        return not again and bool(super().filter(record))

    def format(self, record: logging.LogRecord) -> str:
        if record.name == __name__:
            return record.getMessage()
        level, message = record.levelname.lower(), super().format(record)
        return line_of({**_now(), "level": level, "event": record.name, "message": message})

    def _open(self) -> TextIOWrapper:
        descriptor = os.open(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")


def _now() -> EventDict:
    return {"timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")}


def line_of(event: EventDict) -> str:
    """One event as one line: time, level, name, then `key=value`; values with spaces or quotes as JSON text."""
    first = [_one_line(event.get(name, "-")) for name in _FIRST_FIELDS]
    rest = [f"{_one_line(name)}={_one_line(value)}" for name, value in event.items() if name not in _FIRST_FIELDS]
    return " ".join([*first, *rest])


def _one_line(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if _PLAIN.fullmatch(text):
        return text
    return _LINE_ENDS.sub(lambda match: f"\\u{ord(match[0]):04x}", json.dumps(text, ensure_ascii=False))
