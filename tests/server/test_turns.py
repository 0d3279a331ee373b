from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.turns import Rate, RequestTurns, WorkShare, charge, debt, refusal_at

SHARE = WorkShare(share=0.1, credit=0.2, at_once=2, free=0)


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 0.8)), max_size=200))
def test_the_work_of_a_token_stays_within_its_share(works: list[tuple[float, float]]) -> None:
    """Pauses and works in turn; each work begins when the one before is paid for."""
    now, paid_at, done = 0.0, 0.0, 0.0
    for pause, seconds in works:
        now += pause
        now += debt(SHARE, paid_at, now)
        largest = max((s for _, s in works), default=0)
        assert done <= SHARE.credit + SHARE.share * now + 1e-6 + largest
        now += seconds
        paid_at = charge(SHARE, paid_at, seconds, now)
        done += seconds


def test_little_work_waits_for_nothing() -> None:
    paid_at = 0.0
    for second in range(100):
        assert debt(SHARE, paid_at, float(second)) == 0.0
        paid_at = charge(SHARE, paid_at, 0.09, float(second))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def played(play: Callable[[RequestTurns, Clock], object]) -> None:
    clock = Clock()

    async def run() -> None:
        await play(RequestTurns(Rate(1000.0, 1000), clock, SHARE), clock)  # type: ignore[misc]

    asyncio.run(asyncio.wait_for(run(), 20))


async def worked(turns: RequestTurns, clock: Clock, token: str, seconds: float, path: str = "/list_experts") -> None:
    turn = await turns.of(token, path)
    await turn.begin()
    clock.now += seconds
    turn.end()


def test_alone_a_token_may_have_all_there_is() -> None:
    async def play(turns: RequestTurns, clock: Clock) -> None:
        for _ in range(20):
            await worked(turns, clock, "only", 5.0)

    played(play)


def test_beside_others_a_token_that_had_much_done_is_sent_away_with_a_time() -> None:
    async def play(turns: RequestTurns, clock: Clock) -> None:
        await worked(turns, clock, "honest", 0.01)
        await worked(turns, clock, "greedy", 1.0)
        turn = await turns.of("greedy", "/list_experts")
        with pytest.raises(RefusedError) as refused:
            await turn.begin()
        turn.end()
        assert (refused.value.code, refused.value.facts) == ("too_many_requests", {"retry_after": 6})
        await worked(turns, clock, "honest", 0.01)
        clock.now += 8.0
        await worked(turns, clock, "greedy", 0.01)

    played(play)


def test_whoever_asks_for_one_thing_after_the_other_never_waits() -> None:
    async def play(_: RequestTurns, clock: Clock) -> None:
        turns = RequestTurns(Rate(1000.0, 1000), clock, WorkShare())
        for _number in range(20):
            await worked(turns, clock, "other", 0.1)
            await worked(turns, clock, "reader", 5.0)

    played(play)


def test_no_debt_lasts_longer_than_a_moment() -> None:
    paid_at = charge(SHARE, 0.0, 1000.0, 50.0)
    assert debt(SHARE, paid_at, 50.0 + SHARE.most_debt) == 0.0


def test_uploads_are_not_put_on_that_account() -> None:
    async def play(turns: RequestTurns, clock: Clock) -> None:
        await worked(turns, clock, "other", 0.01)
        for _ in range(20):
            await worked(turns, clock, "worker", 1.0, "/push_expert_update")
        await worked(turns, clock, "worker", 0.01)

    played(play)


def test_a_place_is_given_back_however_a_request_ends() -> None:
    async def play(turns: RequestTurns, clock: Clock) -> None:
        await worked(turns, clock, "other", 0.0)
        for _ in range(5):
            turn = await turns.of("worker", "/list_experts")
            await turn.begin()
            turn.end()
            turn.end()
        held = [await turns.of("worker", "/list_experts") for _ in range(3)]
        await held[0].begin()
        await held[1].begin()
        third = asyncio.create_task(held[2].begin())
        await asyncio.sleep(0.01)
        assert not third.done(), "two at once"
        third.cancel()
        await asyncio.gather(third, return_exceptions=True)
        held[0].end()
        await (await turns.of("worker", "/list_experts")).begin()

    played(play)


def test_refusals_of_one_token_follow_each_other_at_a_pace_and_none_comes_after_a_moment() -> None:
    at, told = -math.inf, []
    for _ in range(64):
        at = refusal_at(at, 100.0)
        told.append(at)
    assert told[0] == 100.0, "the first one at once"
    assert told[3] == 100.75
    assert told == sorted(told)
    assert max(told) == 106.0
    assert refusal_at(told[-1], 200.0) == 200.0
    assert refusal_at(told[-1], 200.0, least=1.0) == 201.0
