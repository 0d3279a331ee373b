"""Logs: for people on a terminal, one JSON object a line everywhere else."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO, cast

import stamina.instrumentation
import structlog


class _StandardError:
    """Standard error as it is when something is written: it may be exchanged after loggers were made."""

    def write(self, text: str) -> int:
        return sys.stderr.write(text)

    def flush(self) -> None:
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
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(cast(TextIO, _StandardError())),
        # Not cached: whoever configures again, or captures what is logged, means every logger.
        cache_logger_on_first_use=False,
    )
    quiet_retries()
    # uvicorn speaks through logging; only what goes wrong there matters here.
    logging.basicConfig(
        stream=cast(TextIO, _StandardError()), level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )


def quiet_retries() -> None:
    """Keep stamina from logging every try: who retries here says so in its own words."""
    stamina.instrumentation.set_on_retry_hooks([])


def warn(event: str, **facts: object) -> None:
    """Log a warning; a command that has set up no logs does so first, for standard output is not theirs."""
    if not structlog.is_configured():
        configure()
    structlog.get_logger().warning(event, **facts)
