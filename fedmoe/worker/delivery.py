"""Delivery: one update on its way in the background, sent again until it is answered, while training goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import stamina

from fedmoe.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, Pushed
from fedmoe.worker.outbox import Pending

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 15.0


@dataclass(frozen=True)
class Answered:
    """The end of a delivery: what the coordinator made of the update, or why it refused it."""

    pushed: Pushed | None
    refused: RefusedError | None
    seconds: float


class Delivery:
    """Sends one pending update from a thread of its own; `answer` is there once the coordinator has spoken.

    While the coordinator is away or sheds load, tries go on with exponential, jittered pauses up to 15 seconds, or what
    it asked for. The thread is a daemon: a worker that must leave leaves, and sends the update after its restart.
    """

    def __init__(
        self, client: CoordinatorClient, pending: Pending, on_trouble: Callable[[CoordinatorUnavailableError], None]
    ) -> None:
        self.pending = pending
        self._client = client
        self._on_trouble = on_trouble
        self._started = time.monotonic()
        self._done = threading.Event()
        self._answer: Answered | None = None
        self._failure: BaseException | None = None
        threading.Thread(target=self._run, name="fedmoe-delivery", daemon=True).start()

    def answer(self) -> Answered | None:
        """The answer, or None while the update is still on its way."""
        if self._failure is not None:
            raise self._failure
        return self._answer if self._done.is_set() else None

    def wait(self, seconds: float) -> Answered | None:
        """The answer, waiting at most so long for it."""
        self._done.wait(seconds)
        return self.answer()

    def _run(self) -> None:
        try:
            self._answer = self._send()
        except BaseException as error:
            self._failure = error
        self._done.set()

    def _send(self) -> Answered:
        attempts = stamina.retry_context(
            on=self._pause, attempts=None, timeout=None, wait_initial=_FIRST_PAUSE, wait_max=_LONGEST_PAUSE
        )
        for attempt in attempts:
            with attempt:
                try:
                    pushed = self._client.push(self.pending.header, self.pending.body)
                except RefusedError as error:
                    return Answered(None, error, time.monotonic() - self._started)
                return Answered(pushed, None, time.monotonic() - self._started)
        raise AssertionError("tries go on until there is an answer")

    def _pause(self, error: Exception) -> bool | float:
        if not isinstance(error, CoordinatorUnavailableError):
            return False
        self._on_trouble(error)
        return error.retry_after if error.retry_after is not None else True
