from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from fedmoe.server.updates.intake import MemoryBudget, SerialQueue


def test_who_fits_goes_at_once_and_the_others_wait_in_the_order_they_came() -> None:
    async def run() -> list[str]:
        budget, inside, done = MemoryBudget(10), [], asyncio.Event()

        async def take(name: str, wanted: int) -> None:
            async with budget.of(wanted):
                inside.append(name)
                await done.wait()

        tasks = []
        for name, wanted in (("a", 6), ("b", 5), ("c", 1)):  # c would fit beside a, but b came first
            tasks.append(asyncio.create_task(take(name, wanted)))
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        before = list(inside)
        done.set()
        await asyncio.gather(*tasks)
        assert before == ["a"]
        return inside

    assert asyncio.run(run()) == ["a", "b", "c"]


def test_a_wish_for_more_than_there_is_is_met_alone() -> None:
    async def run() -> None:
        budget = MemoryBudget(10)
        async with budget.of(1000):
            waiting = asyncio.create_task(_enter(budget, 1))
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting
        async with budget.of(10):
            pass

    asyncio.run(run())


@pytest.mark.parametrize("leaves", ["while it waits", "as its turn comes"])
def test_whoever_leaves_takes_nothing_along(leaves: str) -> None:
    async def run() -> None:
        budget, stack = MemoryBudget(10), AsyncExitStack()
        await stack.enter_async_context(budget.of(8))
        leaving, staying = (asyncio.create_task(_enter(budget, wanted)) for wanted in (10, 2))
        await asyncio.sleep(0)
        assert not staying.done()
        if leaves == "while it waits":
            leaving.cancel()
            await staying  # it stood before somebody who fits
            await stack.aclose()
        else:
            await stack.aclose()
            leaving.cancel()
            await staying
        assert leaving.cancelled() or leaving.cancelling()
        async with asyncio.timeout(1), budget.of(10):
            pass

    asyncio.run(run())


async def _enter(budget: MemoryBudget, wanted: int) -> None:
    async with budget.of(wanted):
        pass


def test_one_thing_at_a_time_and_no_token_fills_the_line() -> None:
    async def run() -> list[str]:
        work, done, most = SerialQueue(), [], 0

        async def one(token: str) -> None:
            nonlocal most
            async with work.turn(token):
                most += 1
                assert most == 1, "one at a time"
                await asyncio.sleep(0)
                most -= 1
                done.append(token)

        greedy = [asyncio.create_task(one("greedy")) for _ in range(50)]
        await asyncio.sleep(0)
        await asyncio.gather(one("honest"), *greedy)
        return done

    done = asyncio.run(run())
    assert done.index("honest") <= 2
    assert len(done) == 51
