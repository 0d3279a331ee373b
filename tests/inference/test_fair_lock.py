from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from fedmoe.inference.fair_lock import FairLock


def test_many_are_together() -> None:
    lock, inside = FairLock(), threading.Barrier(3, timeout=10)

    def enter() -> None:
        with lock.shared():
            inside.wait()

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(enter) for _ in range(3)]:
            future.result()


def test_nobody_is_beside_one_that_is_alone() -> None:
    lock, inside, wrong = FairLock(), [], []

    def enter(alone: bool) -> None:
        for _ in range(200):
            with lock.exclusive() if alone else lock.shared():
                inside.append(alone)
                if True in inside and len(inside) > 1:
                    wrong.append(list(inside))
                inside.remove(alone)

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(enter, index < 2) for index in range(6)]:
            future.result()
    assert wrong == []


def test_newcomers_wait_for_one_that_waits_to_be_alone() -> None:
    lock, order = FairLock(), []
    first_in, let_go = threading.Event(), threading.Event()

    def first() -> None:
        with lock.shared():
            first_in.set()
            assert let_go.wait(10)

    def alone() -> None:
        with lock.exclusive():
            order.append("alone")

    def newcomer() -> None:
        with lock.shared():
            order.append("newcomer")

    with ThreadPoolExecutor(3) as pool:
        held = pool.submit(first)
        assert first_in.wait(10)
        waiting = pool.submit(alone)
        while len(lock._blocks) < 2:
            pass
        late = pool.submit(newcomer)
        let_go.set()
        for future in (held, waiting, late):
            future.result()
    assert order == ["alone", "newcomer"]


def test_one_that_wants_to_be_alone_again_and_again_lets_the_others_through() -> None:
    lock, through = FairLock(), threading.Event()

    def alone() -> None:
        while not through.is_set():
            with lock.exclusive():
                pass

    def others() -> None:
        for _ in range(50):
            with lock.shared():
                pass

    with ThreadPoolExecutor(4) as pool:
        busy = pool.submit(alone)
        for future in [pool.submit(others) for _ in range(3)]:
            future.result(60)
        through.set()
        busy.result()


def test_an_error_inside_lets_the_next_one_in() -> None:
    lock = FairLock()
    for block in (lock.exclusive, lock.shared):
        try:
            with block():
                raise LookupError
        except LookupError:
            pass
    with lock.exclusive():
        pass
