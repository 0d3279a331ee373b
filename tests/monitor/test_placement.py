"""Labels find places that do not cover one another."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.monitor.charts.style import spread

SHARES = st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=12).map(sorted)


@given(SHARES, st.floats(0.001, 0.3))
def test_places_keep_their_distance_order_and_room(wanted: list[float], gap: float) -> None:
    places = spread(wanted, gap)
    kept = min(gap, 1 / max(len(wanted) - 1, 1))
    assert all(later - earlier >= kept - 1e-9 for earlier, later in itertools.pairwise(places))
    assert -1e-9 <= places[0] <= places[-1] <= 1 + 1e-9


def test_places_that_are_far_apart_stay_where_they_are() -> None:
    assert spread([0.1, 0.5, 0.9], 0.2) == pytest.approx([0.1, 0.5, 0.9])


def test_a_crowd_is_centred_on_its_mean() -> None:
    assert spread([0.5, 0.5, 0.5], 0.1) == pytest.approx([0.4, 0.5, 0.6])
