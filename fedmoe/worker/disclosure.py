"""What a worker tells of its data, on its way: sent from a thread of its own, and never a reason to stop training."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping

import structlog

from fedmoe.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.messages import DataStatisticsHeader, StatisticsKind
from fedmoe.worker.delivery import DAMAGED_ON_THE_WAY, pause_seconds

_log = structlog.get_logger("fedmoe.worker")

# Of a worker that was told to stop, for statistics that are still on their way.
_LAST_WAIT_SECONDS = 5.0
_TICK_SECONDS = 0.2


class Disclosure:
    """Sends the statistics of a worker's data once; while the coordinator is away, again and again, as updates are.

    A refusal is logged and ends it. The thread is a daemon: a worker that must leave leaves.
    """

    def __init__(
        self, client: CoordinatorClient, expert: str, worker: str, statistics: Mapping[StatisticsKind, bytes]
    ) -> None:
        self._client = client
        self._waiting = [
            (DataStatisticsHeader(expert=expert, worker=worker, kind=kind), body) for kind, body in statistics.items()
        ]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedmoe-disclosure", daemon=True)

    def start(self) -> None:
        """Begin to send; the expert must be registered."""
        self._thread.start()

    def finish(self, seconds: float, stopped: Callable[[], bool]) -> None:
        """Wait for what is on its way, then try no more: `seconds`, as for an update, or little once `stopped`.

        What was not taken by then is logged: the gateway is made without it.
        """
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(_TICK_SECONDS)
            if stopped():
                deadline = min(deadline, time.monotonic() + _LAST_WAIT_SECONDS)
        if self._thread.is_alive():
            _log.warning("statistics_not_sent", reason="the coordinator did not take them; the next start sends them")
        self.close()

    def close(self) -> None:
        """Try no more."""
        self._closed.set()

    def _run(self) -> None:
        while self._waiting:
            header, body = self._waiting.pop(0)  # let go of once sent: as large as an adapter
            try:
                self._send(header, body)
            except RefusedError as error:
                _log.warning("statistics_refused", kind=header.kind, code=error.code, reason=str(error))
            except Exception as error:
                # The client may be closed under a call that was on its way when the worker left.
                if not self._closed.is_set():
                    _log.warning("statistics_not_sent", kind=header.kind, reason=repr(error))
                return

    def _send(self, header: DataStatisticsHeader, body: bytes) -> None:
        tries = 0
        while not self._closed.is_set():
            try:
                self._client.push_data_statistics(header, body)
                _log.info("statistics_sent", kind=header.kind, size=len(body))
                return
            except (CoordinatorUnavailableError, RefusedError) as error:
                if isinstance(error, RefusedError) and error.code not in DAMAGED_ON_THE_WAY:
                    raise
                tries += 1
                asked = error.retry_after if isinstance(error, CoordinatorUnavailableError) else None
            # Pauses spread load, they are no secret.
            self._closed.wait(pause_seconds(tries, asked, random.random()))  # noqa: S311
