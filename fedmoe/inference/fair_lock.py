"""A readers-writer lock in which neither readers nor writers starve."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class _Ticket:
    exclusive: bool


class FairLock:
    """Blocks of code that run beside each other (`shared`), and blocks that run while no other does (`exclusive`).

    They run in the order they came, so neither kind keeps the other waiting for ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[_Ticket] = []
        self._readers = 0
        self._writing = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Waits while an exclusive block runs, or waits since before."""
        with self._changed:
            ticket = _Ticket(exclusive=False)
            self._wait(ticket, lambda: not self._writing and not self._behind_writer(ticket))
            self._readers += 1
        try:
            yield
        finally:
            with self._changed:
                self._readers -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits until all blocks that came before have ended."""
        with self._changed:
            ticket = _Ticket(exclusive=True)
            self._wait(ticket, lambda: self._waiting[0] is ticket and not self._writing and not self._readers)
            self._writing = True
        try:
            yield
        finally:
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _wait(self, ticket: _Ticket, may_run: Callable[[], bool]) -> None:
        self._waiting.append(ticket)
        try:
            self._changed.wait_for(may_run)
        finally:
            self._waiting.remove(ticket)
            self._changed.notify_all()

    def _behind_writer(self, ticket: _Ticket) -> bool:
        return any(other.exclusive for other in self._waiting[: self._waiting.index(ticket)])
