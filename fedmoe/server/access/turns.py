"""Fair turns: requests per second and share of work per token; requests above either wait or are refused.

What decides is pure: the account and the time come in as arguments.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass

from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.http.body_limits import BodyRefusedError


@dataclass(frozen=True, slots=True)
class Rate:
    """Requests a second in the long run, and how many may come at once."""

    per_second: float
    burst: int


def spend(rate: Rate, full_at: float, now: float) -> tuple[float, float]:
    """One request more: when all of the burst is there again, and the seconds this request has to wait for its turn.

    A token bucket with one number: https://en.wikipedia.org/wiki/Generic_cell_rate_algorithm
    """
    full_at = max(full_at, now) + 1.0 / rate.per_second
    return full_at, max(0.0, full_at - now - rate.burst / rate.per_second)


@dataclass(frozen=True, slots=True)
class WorkShare:
    """How much of the coordinator's time one token's requests may take while others ask too, and how many at once.

    `share` of the time in the long run, `credit` seconds of work beforehand, and no more than `most_debt` seconds to
    wait for it. Whoever has not more than `free` requests under way never waits. Others are there for `others_seconds`
    after they asked. Uploads have places instead: whoever pushes on and on does what workers are for.
    """

    share: float = 0.05
    credit: float = 0.2
    most_debt: float = 10.0
    free: int = 2
    at_once: int = 4
    others_seconds: float = 10.0


def charge(share: WorkShare, paid_at: float, seconds: float, now: float) -> float:
    """When the work of a token is paid for, after it took so many seconds more."""
    return min(max(paid_at, now) + seconds / share.share, now + share.most_debt)


def debt(share: WorkShare, paid_at: float, now: float) -> float:
    """The seconds until a token may have more work done."""
    return max(0.0, paid_at - now - share.credit / share.share)


#: Requests a second of one token; those above wait for their turn, as far as there is one soon.
TOKEN_RATE = Rate(100.0, 200)
#: Requests a second from one address that show no usable token.
STRANGER_RATE = Rate(20.0, 500)
#: Uploads, which have places of their own.
UPLOADS = frozenset({"/push_expert_update", "/push_data_statistics"})
#: What replicas ask before they receive an upload: counted in its place.
UPLOAD_LIMITS = frozenset({"/update_limit", "/data_statistics_limit"})
_LONGEST_TURN = 2.0
# Whoever is refused for haste is answered this late, or at once if so many wait for that already.
_HASTE_SECONDS = 1.0
# Refusals have a price too: those of one token follow each other at this pace, and none is held back longer than this.
_REFUSALS_PER_SECOND = 4.0
_LATEST_REFUSAL = 6.0
_MOST_WAITING = 512
_MOST_ADDRESSES = 4096


@dataclass
class _Account:
    """What one token has asked for."""

    places: asyncio.Semaphore
    under_way: int = 0
    full_at: float = 0.0
    paid_at: float = 0.0
    asked_at: float = -math.inf
    refused_at: float = -math.inf


class RequestTurn:
    """One request's turn: begun when the request is complete, over when its answer begins."""

    def __init__(self, turns: RequestTurns, account: _Account | None) -> None:
        self._turns = turns
        self._account = account
        self._began: float | None = None
        if account is not None:
            account.under_way += 1

    async def begin(self) -> None:
        """Wait for the turn; raises `RefusedError` if that does not come soon."""
        if self._account is not None and self._began is None:
            self._began = await self._turns.begin(self._account)

    def end(self) -> None:
        if self._account is None:
            return
        self._account.under_way -= 1
        if self._began is not None:
            self._turns.end(self._account, self._began)
        self._account = None


class RequestTurns:
    """How fast requests are answered, by token; and by address to those who have none."""

    def __init__(self, rate: Rate | None, clock: Callable[[], float], share: WorkShare | None = None) -> None:
        self._rate = rate
        self._share = share or WorkShare()
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._addresses: dict[str | None, float] = {}
        self._waiting = 0

    async def of(self, token: str, path: str, counted: bool = False) -> RequestTurn:
        """A request's turn, once it may come by the token's rate; raises `RefusedError`, late, if that is not soon.

        An empty token never waits, nor what was `counted` before.
        """
        if self._rate is None or not token or counted:
            return RequestTurn(self, None)
        account = self._accounts.setdefault(token, _Account(asyncio.Semaphore(self._share.at_once)))
        account.asked_at = self._clock()
        full_at, wait = spend(self._rate, account.full_at, self._clock())
        if wait > _LONGEST_TURN:
            raise await self._too_many(account, wait - _LONGEST_TURN, _HASTE_SECONDS)
        account.full_at = full_at
        if wait:
            await asyncio.sleep(wait)
        return RequestTurn(self, None if path in UPLOADS | UPLOAD_LIMITS else account)

    async def begin(self, account: _Account) -> float | None:
        """Wait for one of the token's places, and until its earlier work is paid for; when the work began.

        None where no other token asks, or this one asks for little at once: then nobody waits.
        """
        if account.under_way <= self._share.free or not self._others(account):
            return None
        try:
            async with asyncio.timeout(_LONGEST_TURN):
                await account.places.acquire()
        except TimeoutError:
            wait = debt(self._share, account.paid_at, self._clock())
        else:
            try:
                wait = debt(self._share, account.paid_at, self._clock())
                await asyncio.sleep(min(wait, _LONGEST_TURN))
            except BaseException:
                account.places.release()
                raise
            if wait <= _LONGEST_TURN:
                return self._clock()
            account.places.release()
            wait -= _LONGEST_TURN
        raise await self._too_many(account, wait)

    async def _too_many(self, account: _Account, wait: float, least: float = 0.0) -> RefusedError:
        """The refusal of a request that may be retried in `wait` seconds, delayed to the token's pace of refusals."""
        assert self._rate is not None, "without a rate there are no accounts"
        now = self._clock()
        account.refused_at = refusal_at(account.refused_at, now, least)
        late = account.refused_at - now
        await self._pause(late)
        return BodyRefusedError(
            "too_many_requests",
            f"this token asks for more than its share, which is {self._rate.per_second:g} requests a second, and less "
            "where they take long and others ask too.",
            "Retry after the time given; give each worker a token of its own, or raise --requests-per-second.",
            retry_after=max(1, math.ceil(wait - late)),
        )

    def _others(self, mine: _Account) -> bool:
        """Whether another token has asked lately."""
        since = self._clock() - self._share.others_seconds
        return any(account.asked_at >= since for account in self._accounts.values() if account is not mine)

    def end(self, account: _Account, began: float) -> None:
        """Give the place back, and put the work on the token's account."""
        account.places.release()
        now = self._clock()
        account.paid_at = charge(self._share, account.paid_at, now - began, now)

    async def stranger(self, address: str | None) -> None:
        """Make whoever tries again and again without a usable token wait for the answer."""
        if len(self._addresses) >= _MOST_ADDRESSES:
            self._addresses.clear()
        full_at, wait = spend(STRANGER_RATE, self._addresses.get(address, 0.0), self._clock())
        if wait <= _HASTE_SECONDS:
            self._addresses[address] = full_at
        if wait:
            await self._pause(min(wait, _HASTE_SECONDS))

    async def _pause(self, seconds: float) -> None:
        if self._waiting >= _MOST_WAITING:
            return
        self._waiting += 1
        try:
            await asyncio.sleep(seconds)
        finally:
            self._waiting -= 1


def refusal_at(before: float, now: float, least: float = 0.0) -> float:
    """When to answer a token's next refusal, after the one at `before`: paced, and delayed by a few seconds at most."""
    return now + min(max(least, before + 1.0 / _REFUSALS_PER_SECOND - now), _LATEST_REFUSAL)
