"""What a worker is busy with before its first step, as log lines: for its operator, and for whoever shows workers."""

from __future__ import annotations

from typing import Literal

import structlog

Phase = Literal["loading the base model", "preparing data", "statistics of the data", "training"]

_log = structlog.get_logger("fedmoe.worker")
#: The log line's event.
EVENT = "phase"


class PhaseLog:
    """Logs where a phase is, at each tenth of it; nothing is decided by a clock."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self._told = -1

    def at(self, done: int, total: int) -> None:
        """So much of `total` is done."""
        tenth = 10 * done // total if total else 10
        if tenth > self._told:
            self._told = tenth
            _log.info(EVENT, phase=self._phase, done=done, total=total)


def log_phase(phase: Phase, done: int | None = None) -> None:
    """A phase of which nobody knows how long it is begins, or so much of it is done."""
    _log.info(EVENT, phase=phase, **({} if done is None else {"done": done}))
