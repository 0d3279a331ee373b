from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.turns import Rate, spend
from fedmoe.server.access.uploads import ActiveUpload, UploadLimits, find_place, seconds_early

LIMITS = UploadLimits(total=8, of_token=5, of_worker=2, silent_seconds=2.0)
NOW = 100.0
SENDERS = st.tuples(st.sampled_from(["", "t1", "t2", "t3"]), st.sampled_from(["w1", "w2", "w3", "w4"]))
# Who comes, and how long ago something came from each upload that is there then.
ARRIVALS = st.lists(st.tuples(SENDERS, st.sampled_from([0.0, 1.9, 2.0, 20.0, -math.inf])), max_size=60)


def taken_by(*senders: tuple[str, str], silent: float = 0.0) -> list[ActiveUpload]:
    return [ActiveUpload(n, token, worker, NOW - silent, 10 + n) for n, (token, worker) in enumerate(senders)]


@given(ARRIVALS)
def test_whoever_comes_no_limit_is_ever_passed(arrivals: list[tuple[tuple[str, str], float]]) -> None:
    taken: dict[int, ActiveUpload] = {}
    for number, ((token, worker), silent) in enumerate(arrivals):
        try:
            loser = find_place(token, worker, list(taken.values()), LIMITS, NOW)
        except RefusedError:
            continue
        if loser is not None:
            taken.pop(loser.number)
        taken[number] = ActiveUpload(number, token, worker, NOW - silent, number)
        assert len(taken) <= LIMITS.total
        for name in ("t1", "t2", "t3"):
            assert sum(one.token == name for one in taken.values()) <= LIMITS.of_token
        assert all(
            sum((one.token, one.worker) == (other.token, other.worker) for one in taken.values()) <= LIMITS.of_worker
            for other in taken.values()
        )


@given(ARRIVALS)
def test_nobody_is_refused_while_there_is_room_under_every_limit(
    arrivals: list[tuple[tuple[str, str], float]],
) -> None:
    taken = [
        ActiveUpload(n, token, worker, NOW - silent, n) for n, ((token, worker), silent) in enumerate(arrivals[:7])
    ]
    mine = sum((one.token, one.worker) == ("t1", "w1") for one in taken)
    if mine < LIMITS.of_worker and sum(one.token == "t1" for one in taken) < LIMITS.of_token:
        assert find_place("t1", "w1", taken, LIMITS, NOW) is None


@given(ARRIVALS, SENDERS)
def test_only_who_is_silent_or_has_most_gives_way(
    arrivals: list[tuple[tuple[str, str], float]], sender: tuple[str, str]
) -> None:
    taken = [ActiveUpload(n, token, worker, NOW - silent, n) for n, ((token, worker), silent) in enumerate(arrivals)]
    try:
        victim = find_place(*sender, taken, LIMITS, NOW)
    except RefusedError:
        return
    if victim is not None:
        assert victim.heard_at != math.inf, "an upload that has arrived is never given up"
        most = max(sum(one.token == name for one in taken) for name in ("", "t1", "t2", "t3"))
        silent = NOW - victim.heard_at >= LIMITS.silent_seconds
        assert silent or (victim.token != sender[0] and sum(one.token == victim.token for one in taken) == most)


def test_one_token_leaves_places_for_others_whatever_its_workers_are_called_51() -> None:
    taken = taken_by(*[("greedy", f"new-name-{n}") for n in range(5)])
    with pytest.raises(RefusedError, match="this token has"):
        find_place("greedy", "another-name", taken, LIMITS, NOW)
    assert find_place("honest", "w1", taken, LIMITS, NOW) is None


def test_one_worker_leaves_places_for_others_of_its_token() -> None:
    taken = taken_by(("", "greedy"), ("", "greedy"))
    with pytest.raises(RefusedError, match="worker 'greedy' has"):
        find_place("", "greedy", taken, LIMITS, NOW)
    assert find_place("", "w1", taken, LIMITS, NOW) is None


def test_where_all_places_are_taken_the_longest_silent_gives_way() -> None:
    taken = [ActiveUpload(n, "", f"w{n}", NOW - n, 0) for n in range(8)]
    assert find_place("", "late", taken, LIMITS, NOW) == taken[7]


def test_two_greedy_tokens_together_do_not_shut_out_a_third() -> None:
    taken = taken_by(*[("t1", f"w{n}") for n in range(5)], *[("t2", f"w{n}") for n in range(3)])
    assert find_place("t3", "w1", taken, LIMITS, NOW) == taken[0]
    with pytest.raises(RefusedError, match="8 updates are being received"):
        find_place("t2", "w9", taken, LIMITS, NOW)


RATES = st.builds(Rate, st.floats(0.5, 200), st.integers(1, 300))


@given(RATES, st.lists(st.floats(0, 5), max_size=300))
def test_no_more_requests_get_their_turn_than_the_rate_and_the_burst_allow(rate: Rate, pauses: list[float]) -> None:
    full_at, now, turns = 0.0, 0.0, []
    for pause in pauses:
        now += pause
        then, wait = spend(rate, full_at, now)
        if wait <= 1.0:
            full_at = then
            turns.append(now + wait)
    for first in range(0, len(turns), 7):
        for last in range(first, len(turns), 5):
            passed = turns[last] - turns[first]
            assert last - first + 1 <= rate.burst + passed * rate.per_second + 1 + 1e-6


@given(RATES, st.integers(1, 400))
def test_a_burst_waits_for_nothing_and_the_next_one_a_moment(rate: Rate, count: int) -> None:
    full_at, waits = 0.0, []
    for _ in range(count):
        full_at, wait = spend(rate, full_at, 50.0)
        waits.append(wait)
    assert all(wait < 1e-6 for wait in waits[: rate.burst])
    assert all(wait > 0 for wait in waits[rate.burst :])


def test_a_push_is_early_until_nine_tenths_of_the_interval_are_over() -> None:
    assert seconds_early(None, 5.0, 10.0) == 0.0
    assert seconds_early(5.0, 5.0, 10.0) == 10.0
    assert seconds_early(5.0, 13.0, 10.0) == 2.0
    assert seconds_early(5.0, 14.0, 10.0) == 0.0
