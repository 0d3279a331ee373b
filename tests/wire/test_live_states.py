"""Live states: made once for all readers of a view, merged, and sent to each reader once."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable

import pytest

from fedmoe.wire.http.live import LiveState, LiveStates


class Counted:
    """A state that is a number; `made` are the views that were asked for."""

    def __init__(self) -> None:
        self.value = 0
        self.made: list[str] = []

    def make(self, view: str) -> LiveState:
        self.made.append(view)
        return LiveState(f"{view}-{self.value}", f"{view} at {self.value}")

    def states(self) -> LiveStates[str]:
        return LiveStates(self.make, lambda: self.value)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.01)


def test_a_state_is_made_once_for_all_readers_of_a_view_and_changes_are_merged() -> None:
    counted = Counted()

    async def watch() -> list[int]:
        live, counts = counted.states(), [0] * 5

        async def read(number: int) -> None:
            async for _ in live.stream("all", None):
                counts[number] += 1

        readers = [asyncio.create_task(read(number)) for number in range(5)]
        for _ in range(200):
            counted.value += 1
            await asyncio.sleep(0.01)
        live.close()
        await asyncio.gather(*readers)
        return counts

    began = time.monotonic()
    counts = asyncio.run(watch())
    made = len(counted.made)
    assert 2 <= made <= 2 * (time.monotonic() - began) + 2, "not one for each of 200 changes"
    assert all(2 <= count <= made + 1 for count in counts)


def test_each_view_is_sent_its_own_state_and_none_that_the_reader_has() -> None:
    counted = Counted()

    async def first(live: LiveStates[str], view: str, last: str | None) -> bytes:
        stream = live.stream(view, last)
        assert await anext(stream) == b"retry: 1000\n\n"
        return await anext(stream)

    async def watch() -> None:
        live = counted.states()
        one, two = await asyncio.gather(first(live, "one", None), first(live, "two", "one-0"))
        assert one == b"id: one-0\ndata: one at 0\n\n"
        assert two == b"id: two-0\ndata: two at 0\n\n"
        again = asyncio.create_task(first(live, "one", "one-0"))
        await until(lambda: len(counted.made) > 2)
        assert not again.done(), "nothing has changed for it"
        counted.value = 1
        assert await again == b"id: one-1\ndata: one at 1\n\n"
        live.close()

    asyncio.run(watch())


def test_who_reads_slowly_is_given_the_newest_and_none_in_between() -> None:
    counted = Counted()

    async def watch() -> None:
        live = counted.states()
        stream = live.stream("all", None)
        assert [await anext(stream), await anext(stream)][1] == b"id: all-0\ndata: all at 0\n\n"
        for value in (1, 2):
            counted.value = value
            await until(lambda value=value: len(counted.made) > value)  # type: ignore[misc]
        assert await anext(stream) == b"id: all-2\ndata: all at 2\n\n"
        live.close()
        assert [part async for part in stream] == []

    asyncio.run(watch())


def test_a_state_that_changes_by_time_is_made_again_and_one_that_does_not_is_not() -> None:
    async def watch(oldest: float) -> int:
        counted = Counted()
        live = LiveStates(counted.make, lambda: 0, oldest)
        stream = live.stream("all", None)
        await anext(stream)
        await anext(stream)
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(1.5)
        live.close()
        with pytest.raises(StopAsyncIteration):
            await reading
        return len(counted.made)

    assert asyncio.run(watch(0.1)) > 1
    assert asyncio.run(watch(1e9)) == 1


def test_readers_are_cut_off_where_no_state_can_be_made_and_may_come_again() -> None:
    broken = [True]

    def make(view: str) -> LiveState:
        if broken[0]:
            raise OSError("no disk")
        return LiveState("1", "good")

    async def watch() -> bytes:
        live = LiveStates(make, lambda: 0)
        stream = live.stream("all", None)
        await anext(stream)
        with pytest.raises(OSError, match="no disk"):
            await anext(stream)
        broken[0] = False
        again = live.stream("all", None)
        await anext(again)
        state = await anext(again)
        live.close()
        return state

    assert asyncio.run(watch()) == b"id: 1\ndata: good\n\n"


def test_a_stop_does_not_wait_for_a_state_that_is_being_made() -> None:
    making, go_on = threading.Event(), threading.Event()

    def make(view: str) -> LiveState:
        making.set()
        go_on.wait(60)
        return LiveState("1", "late")

    async def read_until_stopped() -> list[bytes]:
        states: LiveStates[str] = LiveStates(make, lambda: 1)
        reader = asyncio.create_task(_all(states.stream("a", None)))
        await asyncio.to_thread(making.wait, 60)
        states.close()
        return await reader

    read: list[bytes] = []
    stopped = threading.Thread(target=lambda: read.extend(asyncio.run(read_until_stopped())), daemon=True)
    stopped.start()
    stopped.join(30)
    assert not stopped.is_alive()
    assert not any(b"late" in event for event in read)
    go_on.set()


async def _all(stream: AsyncIterator[bytes]) -> list[bytes]:
    return [event async for event in stream]
