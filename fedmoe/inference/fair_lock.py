"""Many together, or one alone."""

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

    Whoever comes first goes first, so neither kind keeps the other waiting for ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[_Ticket] = []
        self._together = 0
        self._alone = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Waits while somebody is alone, or waits to be since before."""
        with self._changed:
            ticket = _Ticket(exclusive=False)
            self._wait(ticket, lambda: not self._alone and not self._behind_one_alone(ticket))
            self._together += 1
        try:
            yield
        finally:
            with self._changed:
                self._together -= 1
                self._changed.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Waits until all who came before are through, and nobody is inside."""
        with self._changed:
            ticket = _Ticket(exclusive=True)
            self._wait(ticket, lambda: self._waiting[0] is ticket and not self._alone and not self._together)
            self._alone = True
        try:
            yield
        finally:
            with self._changed:
                self._alone = False
                self._changed.notify_all()

    def _wait(self, ticket: _Ticket, may_go: Callable[[], bool]) -> None:
        self._waiting.append(ticket)
        try:
            self._changed.wait_for(may_go)
        finally:
            self._waiting.remove(ticket)
            self._changed.notify_all()

    def _behind_one_alone(self, ticket: _Ticket) -> bool:
        return any(other.exclusive for other in self._waiting[: self._waiting.index(ticket)])
