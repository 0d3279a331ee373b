"""Labels find places that do not cover one another."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.monitor.charts.label_layout import Box, place_labels, spread

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


def test_labels_of_a_crowd_do_not_cover_each_other() -> None:
    anchors = [(3.0 + 0.2 * i, 3.0 + 0.1 * i) for i in range(8)]
    boxes = place_labels(anchors, [(1.2, 0.34)] * 8, np.array(anchors), Box(0, 0, 8, 6))
    assert all(one.overlap(other) < 0.005 for one, other in itertools.combinations(boxes, 2))


def test_a_label_stays_in_the_room_and_off_the_points() -> None:
    points = np.array([(x, 0.7) for x in np.linspace(0, 3, 40)])
    (box,) = place_labels([(0.2, 0.3)], [(1.0, 0.3)], points, Box(0, 0, 4, 3))
    assert box.left >= 0
    assert box.bottom >= 0
    assert box.holds(points) == 0
