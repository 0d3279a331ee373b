from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.simulation.presence import Presence

MOMENTS = st.floats(0, 100)
SECONDS = st.floats(0.01, 40)


@st.composite
def presences(draw: st.DrawFn) -> Presence:
    joins = draw(st.floats(0, 30))
    leaves = draw(st.one_of(st.just(math.inf), st.floats(40, 200)))
    edges = sorted(draw(st.lists(st.floats(0, 150), max_size=8, unique=True)))
    return Presence(joins, leaves, tuple(zip(edges[::2], edges[1::2], strict=False)))


def test_an_outage_is_no_time_of_work() -> None:
    presence = Presence(2.0, 20.0, ((5.0, 8.0), (10.0, 11.0)))
    assert presence.worked(0.0, 9.0) == 4.0
    assert presence.after(0.0, 3.0) == 5.0
    assert presence.after(0.0, 3.5) == 8.5
    assert presence.after(0.0, 6.0) == 12.0
    assert presence.after(0.0, 15.0) == math.inf
    assert [presence.is_there(moment) for moment in (1.0, 2.0, 5.0, 8.0, 20.0)] == [False, True, False, True, False]


def test_a_transfer_that_is_cut_off_begins_anew() -> None:
    presence = Presence(0.0, math.inf, ((5.0, 8.0), (10.0, 11.0)))
    through = presence.transfer(4.0, 2.0)
    assert (through.end, through.cut_off) == (10.0, 1)
    through = presence.transfer(4.0, 3.0)
    assert (through.end, through.cut_off) == (14.0, 2)


def test_one_who_leaves_delivers_no_more() -> None:
    assert Presence(0.0, 5.0).transfer(4.0, 2.0).end == math.inf


@given(presences(), MOMENTS, SECONDS)
def test_after_is_the_end_of_so_much_work(presence: Presence, since: float, seconds: float) -> None:
    end = presence.after(since, seconds)
    assert presence.worked(since, end) == pytest.approx(min(seconds, presence.worked(since, math.inf)))


@given(presences(), MOMENTS, SECONDS)
def test_a_transfer_is_in_one_piece_of_presence(presence: Presence, since: float, seconds: float) -> None:
    end = presence.transfer(since, seconds).end
    if math.isfinite(end):
        assert end - seconds >= since - 1e-9
        assert presence.worked(end - seconds, end) == pytest.approx(seconds)


@given(presences(), MOMENTS)
def test_windows_rise_and_hold_only_moments_of_presence(presence: Presence, since: float) -> None:
    windows = list(presence.windows(since))
    edges = [edge for window in windows for edge in window]
    assert edges == sorted(edges)
    for start, end in windows:
        assert presence.is_there(start)
        assert presence.is_there((start + min(end, start + 1.0)) / 2)
