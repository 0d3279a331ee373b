"""Signal handling: the first SIGTERM or SIGINT stops gracefully, a later one ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

# torchrun and some supervisors send the same signal twice in a row; only a later one is a second request.
_SAME_REQUEST_SECONDS = 2.0


class StopOnSignal:
    """Calls `stop` at the first SIGTERM or SIGINT; one that comes two seconds later or more ends the process at once.

    Ending at once is safe: the state on disk is whole at any moment.
    """

    def __init__(self, stop: Callable[[], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._stop = stop
        self._clock = clock
        self._first: float | None = None

    def install(self) -> None:
        """Take over both signals for the rest of the process's life; in another thread than the main one, none."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle)

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """What a signal does."""
        if self._first is None:
            self._first = self._clock()
            self._stop()
        elif self._clock() - self._first >= _SAME_REQUEST_SECONDS:
            os._exit(128 + number)
