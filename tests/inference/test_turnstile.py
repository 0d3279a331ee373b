from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from fedmoe.inference.fair_lock import Turnstile


def test_many_are_together() -> None:
    stile, inside = Turnstile(), threading.Barrier(3, timeout=10)

    def enter() -> None:
        with stile.together():
            inside.wait()

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(enter) for _ in range(3)]:
            future.result()


def test_nobody_is_beside_one_that_is_alone() -> None:
    stile, inside, wrong = Turnstile(), [], []

    def enter(alone: bool) -> None:
        for _ in range(200):
            with stile.alone() if alone else stile.together():
                inside.append(alone)
                if True in inside and len(inside) > 1:
                    wrong.append(list(inside))
                inside.remove(alone)

    with ThreadPoolExecutor(6) as pool:
        for future in [pool.submit(enter, index < 2) for index in range(6)]:
            future.result()
    assert wrong == []


def test_newcomers_wait_for_one_that_waits_to_be_alone() -> None:
    stile, order = Turnstile(), []
    first_in, let_go = threading.Event(), threading.Event()

    def first() -> None:
        with stile.together():
            first_in.set()
            assert let_go.wait(10)

    def alone() -> None:
        with stile.alone():
            order.append("alone")

    def newcomer() -> None:
        with stile.together():
            order.append("newcomer")

    with ThreadPoolExecutor(3) as pool:
        held = pool.submit(first)
        assert first_in.wait(10)
        waiting = pool.submit(alone)
        while not stile._waiting:
            pass
        late = pool.submit(newcomer)
        let_go.set()
        for future in (held, waiting, late):
            future.result()
    assert order == ["alone", "newcomer"]


def test_one_that_wants_to_be_alone_again_and_again_lets_the_others_through() -> None:
    stile, through = Turnstile(), threading.Event()

    def alone() -> None:
        while not through.is_set():
            with stile.alone():
                pass

    def others() -> None:
        for _ in range(50):
            with stile.together():
                pass

    with ThreadPoolExecutor(4) as pool:
        busy = pool.submit(alone)
        for future in [pool.submit(others) for _ in range(3)]:
            future.result(60)
        through.set()
        busy.result()


def test_an_error_inside_lets_the_next_one_in() -> None:
    stile = Turnstile()
    for block in (stile.alone, stile.together):
        try:
            with block():
                raise LookupError
        except LookupError:
            pass
    with stile.alone():
        pass
