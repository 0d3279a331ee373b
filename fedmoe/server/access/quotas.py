"""Quota arithmetic: request rates, shares of work, places for uploads, the minimum interval between pushes.

Decisions only: who asks, what is taken and the time come in as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True, slots=True)
class UploadLimits:
    """Uploads under way: in all, of one token, of one worker with it; after how many silent seconds one gives way."""

    total: int = 96
    of_token: int = 64
    of_worker: int = 16
    silent_seconds: float = 2.0


@dataclass(frozen=True, slots=True)
class ActiveUpload:
    """An upload that has a place: whose it is, when bytes last came, and how many have come.

    An empty `token` is that of everybody, where none is asked for. `heard_at` is infinite once all has arrived: then it
    waits for the coordinator, and gives way to nobody.
    """

    number: int
    token: str
    worker: str
    heard_at: float
    size: int


@dataclass(frozen=True, slots=True)
class Place:
    """A place for an upload: free, or that of the upload `instead_of`; or none, since `full` is full."""

    instead_of: int | None = None
    full: str = ""


def find_place(token: str, worker: str, taken: Sequence[ActiveUpload], limits: UploadLimits, now: float) -> Place:
    """Where an upload whose first bytes came can go.

    Where a limit is reached, the upload of those under it that was silent longest gives way. Where all places are
    taken by others, the smallest upload of the token that has most of them gives way to one that has less than half.
    """
    of_worker = [upload for upload in taken if (upload.token, upload.worker) == (token, worker)]
    if len(of_worker) >= limits.of_worker:
        return _given_up(of_worker, limits, now) or Place(full=f"worker {worker!r}")
    of_token = [upload for upload in taken if upload.token == token]
    if token and len(of_token) >= limits.of_token:
        return _given_up(of_token, limits, now) or Place(full="this token")
    if len(taken) < limits.total:
        return Place()
    return _given_up(taken, limits, now) or _shared(token, taken) or Place(full="the coordinator")


def _given_up(taken: Sequence[ActiveUpload], limits: UploadLimits, now: float) -> Place | None:
    longest = min(taken, key=lambda upload: (upload.heard_at, upload.number))
    return Place(longest.number) if now - longest.heard_at >= limits.silent_seconds else None


def _shared(token: str, taken: Sequence[ActiveUpload]) -> Place | None:
    counts: dict[str, int] = {}
    for one in taken:
        counts[one.token] = counts.get(one.token, 0) + 1
    greediest = max(counts, key=lambda name: (counts[name], name))
    if 2 * (counts.get(token, 0) + 1) > counts[greediest]:
        return None
    arriving = [(one.size, one.number) for one in taken if one.token == greediest and one.heard_at < math.inf]
    return Place(min(arriving)[1]) if arriving else None


def seconds_early(last: float | None, now: float, interval: float) -> float:
    """How much too early a push comes after one at `last`; a tenth of the interval is left to the network's jitter."""
    if last is None or now - last >= 0.9 * interval:
        return 0.0
    return interval - (now - last)
