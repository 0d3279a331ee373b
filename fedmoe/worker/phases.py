"""Log lines about the phases before a worker's first step, for its operator and for programs that show workers."""

from __future__ import annotations

from typing import Literal

import structlog

Phase = Literal["loading the base model", "preparing data", "statistics of the data", "training"]

_log = structlog.get_logger("fedmoe.worker")
#: The log line's event.
EVENT = "phase"


class PhaseLog:
    """Logs the progress of a phase at each tenth of it, whatever the time."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self._logged = -1

    def update(self, done: int, total: int) -> None:
        """Log a line if another tenth of `total` is done."""
        tenth = 10 * done // total if total else 10
        if tenth > self._logged:
            self._logged = tenth
            _log.info(EVENT, phase=self._phase, done=done, total=total)


def log_phase(phase: Phase, done: int | None = None) -> None:
    """Log that a phase of unknown length begins, or how much of it is done."""
    _log.info(EVENT, phase=phase, **({} if done is None else {"done": done}))
