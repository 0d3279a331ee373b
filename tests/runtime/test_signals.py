import os
import signal

import pytest

from fedmoe.runtime.stop_signals import StopOnSignal


def test_the_first_signal_stops_in_order_and_an_echo_changes_nothing() -> None:
    """torchrun sends on what the whole group got already."""
    stops: list[int] = []
    now = [100.0]
    handler = StopOnSignal(lambda: stops.append(1), lambda: now[0])
    handler.handle(signal.SIGTERM)
    now[0] += 1.9
    handler.handle(signal.SIGTERM)
    assert stops == [1]


def test_a_later_signal_ends_the_process_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    now = [100.0]
    handler = StopOnSignal(lambda: None, lambda: now[0])
    handler.handle(signal.SIGTERM)
    now[0] += 2.1
    handler.handle(signal.SIGINT)
    assert left == [130]


def test_both_signals_are_taken_over() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stops: list[int] = []
    try:
        StopOnSignal(lambda: stops.append(1)).install()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stops == [1]
