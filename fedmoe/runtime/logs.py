"""Logs: for people on a terminal, one JSON object a line everywhere else."""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from contextlib import suppress
from types import TracebackType
from typing import TextIO, cast

import stamina.instrumentation
import structlog

from fedmoe.runtime.safe_text import inert


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
    renderer: structlog.types.Processor = (
        structlog.dev.ConsoleRenderer(colors=colours) if terminal else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _inert_facts,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _StandardError())),
        # Not cached: whoever configures again, or captures what is logged, means every logger.
        cache_logger_on_first_use=False,
    )
    quiet_retries()
    # uvicorn, asyncio and the like speak through logging; only what goes wrong there matters here.
    logging.basicConfig(handlers=[_InOurWords()], level=logging.WARNING)


class _InOurWords(logging.Handler):
    """What libraries log, as events of this log: a traceback is a fact of one line, not lines of their own."""

    def emit(self, record: logging.LogRecord) -> None:
        facts = {"logger": record.name}
        if record.exc_info and record.exc_info[0] is not None:
            facts["exception"] = "".join(traceback.format_exception(*record.exc_info))
        structlog.get_logger().log(max(record.levelno, logging.WARNING), record.getMessage().strip(), **facts)


def log_what_nobody_caught() -> None:
    """Log errors that end this process or one of its threads, and warnings of Python, like everything else.

    For services, whose log is read by programs; a command shows its traceback as Python does.
    """

    def ends_process(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            return
        told = "".join(traceback.format_exception(kind, error, trace))
        structlog.get_logger().critical("uncaught", error=repr(error), exception=told)

    def ends_thread(ended: threading.ExceptHookArgs) -> None:
        told = "".join(traceback.format_exception(ended.exc_type, ended.exc_value, ended.exc_traceback))
        name = ended.thread.name if ended.thread is not None else ""
        structlog.get_logger().critical("uncaught", error=repr(ended.exc_value), thread=name, exception=told)

    if not sys.stderr.isatty():
        sys.excepthook, threading.excepthook = ends_process, ends_thread
        logging.captureWarnings(True)


def _inert_facts(_: object, __: str, facts: structlog.types.EventDict) -> structlog.types.EventDict:
    """What others wrote (names, messages, paths) reaches no terminal raw, neither now nor when a log is looked at."""
    return {name: inert(value, keep="\n") if isinstance(value, str) else value for name, value in facts.items()}


def quiet_retries() -> None:
    """Keep stamina from logging every try: who retries here says so in its own words."""
    stamina.instrumentation.set_on_retry_hooks([])


def warn(event: str, **facts: object) -> None:
    """Log a warning; a command that has set up no logs does so first, for standard output is not theirs."""
    if not structlog.is_configured():
        configure()
    structlog.get_logger().warning(event, **facts)
