"""The workers of a simulation as they are drawn from its configuration and seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedmoe.simulation.config import Fleet, Outages
from fedmoe.simulation.presence import Interval, Presence

_BYTES_PER_MEGABIT = 125_000.0


@dataclass(frozen=True, slots=True)
class Link:
    """A worker's way to the coordinator: bytes a second up and down, and the seconds that any message takes."""

    up: float
    down: float
    latency: float

    def up_seconds(self, size: int) -> float:
        """How long so many bytes take to the coordinator."""
        return self.latency + size / self.up

    def down_seconds(self, size: int) -> float:
        """How long so many bytes take from the coordinator."""
        return self.latency + size / self.down


@dataclass(frozen=True, slots=True)
class WorkerProfile:
    """A worker as a process: its number, its expert's, seconds a step, link, and when it is there."""

    number: int
    expert: int
    step_seconds: float
    link: Link
    presence: Presence

    @property
    def name(self) -> str:
        """As the coordinator knows it."""
        return f"worker-{self.number}"


def expert_name(number: int) -> str:
    """The name of an expert by its number."""
    return f"expert-{number}"


def draw_fleet(fleet: Fleet, seconds: float, seed: int) -> list[WorkerProfile]:
    """The workers of a run of so many seconds; each is drawn from a seed of its own, so more of them change none."""
    return [_draw(fleet, seconds, number, np.random.default_rng([seed, number])) for number in range(fleet.workers)]


def _draw(fleet: Fleet, seconds: float, number: int, random: np.random.Generator) -> WorkerProfile:
    # All are drawn whether they are used or not: a fleet without churn has the links of the same one with it.
    up, down = (_rate(bounds, random.random()) for bounds in (fleet.up_mbit, fleet.down_mbit))
    joins_late, joins, leaves_early, leaves = random.random(4)
    begin = joins * (seconds if joins_late < fleet.churn.joining else fleet.start_within)
    end = begin + leaves * (seconds - begin) if leaves_early < fleet.churn.leaving else math.inf
    outages = _outages(fleet.outages, seconds, random) if fleet.outages is not None else ()
    slowness = fleet.slowness[number // fleet.experts % len(fleet.slowness)]
    link = Link(up, down, fleet.latency_ms / 1000)
    return WorkerProfile(
        number, number % fleet.experts, fleet.step_seconds * slowness, link, Presence(begin, end, outages)
    )


def _rate(bounds: tuple[float, float], place: float) -> float:
    low, high = bounds
    return float(low * (high / low) ** place) * _BYTES_PER_MEGABIT


def _outages(outages: Outages, seconds: float, random: np.random.Generator) -> tuple[Interval, ...]:
    drawn: list[Interval] = []
    start = float(random.exponential(outages.every))
    while start < seconds:
        end = start + float(random.exponential(outages.length))
        drawn.append((start, end))
        start = end + float(random.exponential(outages.every))
    return tuple(drawn)
