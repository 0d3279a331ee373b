"""Calls a function periodically in a background thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated(act: Callable[[], object], seconds: float, name: str, first: float | None = None) -> Iterator[None]:
    """Call `act` every `seconds` while inside, the first time after `first` seconds; `name` is the thread's.

    At the end it waits for a call that has begun.
    """
    done = threading.Event()

    def run() -> None:
        pause = seconds if first is None else first
        while not done.wait(pause):
            act()
            pause = seconds

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
