"""A fair readers-writer lock: with vLLM, loading an adapter is the writer and generating the reader."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class _LockBlock:
    exclusive: bool


class FairLock:
    """Blocks of code that run beside each other (`shared`), and blocks that run while no other does (`exclusive`).

    They run in the order they came, so neither kind keeps the other waiting for ever.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        #: Those that run and those that wait, in the order they came.
        self._blocks: list[_LockBlock] = []

    def shared(self) -> AbstractContextManager[None]:
        """Waits while an exclusive block runs, or waits since before."""
        return self._turn(_LockBlock(exclusive=False))

    def exclusive(self) -> AbstractContextManager[None]:
        """Waits until all blocks that came before have ended."""
        return self._turn(_LockBlock(exclusive=True))

    @contextmanager
    def _turn(self, block: _LockBlock) -> Iterator[None]:
        with self._changed:
            self._blocks.append(block)
        try:
            with self._changed:
                self._changed.wait_for(lambda: self._may_run(block))
            yield
        finally:
            with self._changed:
                self._blocks.remove(block)
                self._changed.notify_all()

    def _may_run(self, block: _LockBlock) -> bool:
        before = self._blocks[: self._blocks.index(block)]
        return not (before if block.exclusive else any(other.exclusive for other in before))
