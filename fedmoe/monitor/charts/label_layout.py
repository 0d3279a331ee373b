"""Label placement without overlaps: plain geometry, no drawing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from fedmoe.lora.adapter import Float64Array


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places in [0, 1] as near as can be to the wanted ones (ascending), `gap` apart where there is room.

    Least squares: values that are too close form a block that is centred on their mean (pool adjacent violators).
    """
    gap = min(gap, 1 / max(len(places) - 1, 1))
    blocks: list[tuple[float, int]] = []
    for index, value in enumerate(places):
        blocks.append((value - index * gap, 1))
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (before, many), (mean, count) = blocks[-2:]
            blocks[-2:] = [((before * many + mean * count) / (many + count), many + count)]
    shifts = [mean for mean, count in blocks for _ in range(count)]
    highest = 1 - (len(places) - 1) * gap
    return [min(max(shift, 0.0), highest) + index * gap for index, shift in enumerate(shifts)]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in inches, y upwards."""

    left: float
    bottom: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """The common area in square inches."""
        wide = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        high = min(self.bottom + self.height, other.bottom + other.height) - max(self.bottom, other.bottom)
        return max(wide, 0.0) * max(high, 0.0)

    def nearest(self, point: tuple[float, float]) -> tuple[float, float]:
        """The place of the box that is nearest to a point, as shares of its width and height."""
        x, y = (point[0] - self.left) / self.width, (point[1] - self.bottom) / self.height
        return min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)

    def holds(self, points: Float64Array) -> int:
        """How many of the points (n, 2) lie inside."""
        x, y = points[:, 0], points[:, 1]
        inside = (x > self.left) & (x < self.left + self.width) & (y > self.bottom) & (y < self.bottom + self.height)
        return int(inside.sum())


def place_labels(
    anchors: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], points: Float64Array, room: Box
) -> list[Box]:
    """A box for every label (sizes in inches) near its anchor, over as few points (n, 2) and boxes as can be.

    One after the other takes the cheapest of 64 places around its anchor, all in inches inside `room` where possible.
    """
    taken = [Box(x - 0.12, y - 0.12, 0.24, 0.24) for x, y in anchors]
    leaders = np.empty((0, 2))
    boxes: list[Box] = []
    for anchor, size in zip(anchors, sizes, strict=True):
        best = min(_around(anchor, size), key=lambda box: _cost(box, anchor, taken, leaders, points, room))
        leaders = np.concatenate([leaders, _leader(anchor, best)])
        taken.append(best)
        boxes.append(best)
    return boxes


def _around(anchor: tuple[float, float], size: tuple[float, float]) -> list[Box]:
    """Places at four distances in sixteen directions; a box hangs on its anchor by the side that faces it."""
    boxes = []
    for distance, turn in product((0.2, 0.45, 0.8, 1.2), range(16)):
        side, up = float(np.cos(turn * np.pi / 8)), float(np.sin(turn * np.pi / 8))
        x, y = anchor[0] + side * (distance + size[0] / 2), anchor[1] + up * (distance + size[1] / 2)
        boxes.append(Box(x - size[0] / 2, y - size[1] / 2, *size))
    return boxes


def _cost(
    box: Box, anchor: tuple[float, float], taken: Sequence[Box], leaders: Float64Array, points: Float64Array, room: Box
) -> float:
    own = _leader(anchor, box)
    outside = box.width * box.height - box.overlap(room)
    crowd = sum(box.overlap(other) for other in taken)
    crossed = box.holds(leaders) + sum(other.holds(own) for other in taken)
    near = np.abs(points[:, None, :] - own[None]).max(axis=2).min(axis=1, initial=np.inf) < 0.06
    length = math.dist(anchor, own[-1])
    return 60 * outside + 4000 * crowd + 3 * crossed + 0.6 * box.holds(points) + 0.12 * int(near.sum()) + length


def _leader(anchor: tuple[float, float], box: Box) -> Float64Array:
    """Points (12, 2) on the line from the ring around the anchor to the nearest point of the box."""
    x, y = box.nearest(anchor)
    start, end = np.array(anchor), np.array([box.left + x * box.width, box.bottom + y * box.height])
    shares = np.linspace(min(0.15 / max(math.dist(start, end), 0.15), 0.9), 0.98, 12)
    return np.asarray(start + shares[:, None] * (end - start))
