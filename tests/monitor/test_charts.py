"""Charts are made from records alone."""

from __future__ import annotations

import io

import numpy as np
from matplotlib.image import imread

from fedmoe.monitor.charts.federation import loss_chart
from fedmoe.runtime.records import Record

HELD_OUT = {
    "python": {"base": 2.7, "own expert": 2.4, "gateway": 2.5},
    "sql": {"base": 2.4, "own expert": 2.0, "gateway": 2.2},
}


def records() -> list[Record]:
    steps: list[Record] = [
        {"at": 10.0 + number, "kind": "step", "worker": worker, "loss": 3.0 - 0.05 * number}
        for number in range(20)
        for worker in ("w1", "w2")
    ]
    return [
        *steps,
        {"at": 15.0, "kind": "push", "worker": "w1"},
        {"at": 12.0, "kind": "step", "worker": "w1", "loss": None},
    ]


def test_the_chart_is_a_picture_that_shows_something() -> None:
    picture = imread(io.BytesIO(loss_chart(records(), HELD_OUT)))
    assert picture.shape[0] > 300
    assert picture.shape[1] > 900
    assert np.ptp(picture[..., :3]) > 0.5


def test_other_records_give_another_picture_and_the_same_ones_the_same() -> None:
    assert loss_chart(records(), HELD_OUT) == loss_chart(records(), HELD_OUT)
    assert loss_chart(records()[:10], HELD_OUT) != loss_chart(records(), HELD_OUT)
