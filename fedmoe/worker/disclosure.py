"""Disclosure: a worker's statistics of its data, made between its training steps and sent to the coordinator once."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import structlog

from fedmoe.datasets.tokens.packing import Block
from fedmoe.lora.moments import InputMoments, thin
from fedmoe.models.base import LoadedBase
from fedmoe.models.device_faults import is_out_of_memory
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import DataStatisticsHeader, StatisticsKind
from fedmoe.wire.delivery import until_answered
from fedmoe.worker.report import PhaseLog
from fedmoe.worker.statistics import StatisticsPass, read_cached, statistics_key, write_cached

# Seconds that a worker which was asked to stop waits for statistics that are still on their way.
_LAST_WAIT_SECONDS = 5.0
_TICK_SECONDS = 0.2
_log = structlog.get_logger("fedmoe.worker")

#: The base model as if no adapter were attached, for as long as the context is open.
BareBase = Callable[[], AbstractContextManager[object]]


class Disclosure:
    """Makes the statistics of a worker's data a part after each step, caches them in `folder`, has them sent.

    Training begins at once, and a worker that is stopped early makes them at its next start. Make it on the bare base
    model, before an adapter is attached. Data that are too few have none, which is logged; so is a device without the
    memory for them.
    """

    def __init__(
        self,
        base: LoadedBase,
        blocks: Sequence[Block],
        targets: Sequence[str] | str,
        folder: Path,
        send: Callable[[Mapping[StatisticsKind, bytes]], StatisticsSender],
    ) -> None:
        self._send, self._folder = send, folder
        self._pass: StatisticsPass | None = None
        self._ready: Mapping[StatisticsKind, bytes] = {}
        self._sender: StatisticsSender | None = None
        self._seconds = 0.0
        self._key = statistics_key(base, blocks, targets)
        if cached := read_cached(folder, self._key):
            tokens = InputMoments.from_bytes(cached["moments"]).tokens
            _log.info("statistics_kept", folder=str(folder), tokens=tokens)
            _warn_if_thin(tokens)
            self._ready = cached
            return
        try:
            self._pass = StatisticsPass(base, blocks, targets, progress=PhaseLog("statistics of the data").update)
        except ValueError as error:  # too little data, or a base model that has no such numbers: training needs neither
            _log.warning("no_statistics", reason=str(error))

    def registered(self) -> None:
        """The expert is registered: what is cached can be sent."""
        if self._ready:
            self._start(self._ready)

    def advance(self, bare_base: BareBase, tokens: float) -> None:
        """Make another part, about as much work as a training step of so many tokens; send all once it is whole."""
        if self._pass is None:
            return
        began = time.monotonic()
        try:
            with bare_base():
                self._pass.advance(tokens)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _log.warning("no_statistics", reason=f"the device has no memory for them: {error}"[:300])
            self._pass = None
            return
        self._seconds += time.monotonic() - began
        if self._pass.finished:
            made, self._pass = self._pass, None
            self._start(self._cached(made))

    def finish(self, bare_base: BareBase, seconds: float, stopped: Callable[[], bool]) -> None:
        """Make what is missing, unless `stopped`, and wait `seconds` for what is on its way."""
        if not stopped():
            self.advance(bare_base, float("inf"))
        if self._sender is not None:
            self._sender.finish(seconds, stopped)

    def close(self) -> None:
        """Try to send no more."""
        if self._sender is not None:
            self._sender.close()

    def _start(self, bodies: Mapping[StatisticsKind, bytes]) -> None:
        self._ready = {}
        self._sender = self._send(bodies)
        self._sender.start()

    def _cached(self, made: StatisticsPass) -> Mapping[StatisticsKind, bytes]:
        statistics = made.statistics()
        _log.info(
            "statistics",
            prompts=statistics.prompts.count,
            of_samples=statistics.samples,
            tokens=statistics.moments.tokens,
            of_tokens=statistics.tokens,
            seconds=round(self._seconds, 1),
        )
        _warn_if_thin(statistics.moments.tokens)
        bodies = statistics.to_bytes()
        write_cached(self._folder, self._key, bodies)
        return bodies


def _warn_if_thin(tokens: int) -> None:
    if note := thin(tokens):
        _log.warning("thin_statistics", reason=f"the data give {note}")


class StatisticsSender:
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
        """Begin to send; the expert must be registered already."""
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
                if until_answered(partial(self._client.push_data_statistics, header, body), self._closed) is not None:
                    _log.info("statistics_sent", kind=header.kind, size=len(body))
            except RefusedError as error:
                _log.warning("statistics_refused", kind=header.kind, code=error.code, reason=str(error))
            except Exception as error:
                # The client may be closed under a call that was on its way when the worker left.
                if not self._closed.is_set():
                    _log.warning("statistics_not_sent", kind=header.kind, reason=repr(error))
                return
