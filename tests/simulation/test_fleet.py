from __future__ import annotations

import math

from fedmoe.simulation.config import Fleet
from fedmoe.simulation.fleet import draw_fleet

FLEET = Fleet.model_validate(
    {
        "workers": 40,
        "experts": 4,
        "step_seconds": 2.0,
        "slowness": [1, 1, 2, 4, 8],
        "up_mbit": [1, 100],
        "start_within": 10.0,
        "outages": {"every": 50, "length": 5},
        "churn": {"joining": 0.5, "leaving": 0.5},
    }
)


def test_every_expert_has_workers_of_every_speed() -> None:
    workers = draw_fleet(FLEET, 1000.0, 0)
    for expert in range(4):
        seconds = sorted(worker.step_seconds for worker in workers if worker.expert == expert)
        assert seconds == [2.0] * 4 + [4.0] * 2 + [8.0] * 2 + [16.0] * 2


def test_a_fleet_is_drawn_from_its_seed_and_more_workers_change_none() -> None:
    assert draw_fleet(FLEET, 1000.0, 7) == draw_fleet(FLEET, 1000.0, 7)
    assert draw_fleet(FLEET, 1000.0, 7) != draw_fleet(FLEET, 1000.0, 8)
    larger = FLEET.model_copy(update={"workers": 80})
    assert draw_fleet(larger, 1000.0, 7)[:40] == draw_fleet(FLEET, 1000.0, 7)


def test_rates_and_moments_lie_within_their_bounds() -> None:
    workers = draw_fleet(FLEET, 1000.0, 0)
    late = [worker.presence.joins for worker in workers if worker.presence.joins > 10.0]
    left = [worker.presence.leaves for worker in workers if worker.presence.leaves < math.inf]
    assert 10 <= len(late) <= 30
    assert 10 <= len(left) <= 30
    for worker in workers:
        assert 1.25e5 <= worker.link.up <= 1.25e7
        assert 0.0 <= worker.presence.joins < worker.presence.leaves
        edges = [edge for outage in worker.presence.outages for edge in outage]
        assert edges == sorted(edges)
    assert sum(len(worker.presence.outages) for worker in workers) > 400


def test_the_ideal_fleet_is_the_same_without_troubles() -> None:
    workers, ideal = draw_fleet(FLEET, 1000.0, 0), draw_fleet(FLEET.ideal, 1000.0, 0)
    assert [worker.link for worker in ideal] == [worker.link for worker in workers]
    assert {worker.step_seconds for worker in ideal} == {2.0}
    assert {worker.presence.outages for worker in ideal} == {()}
    assert {worker.presence.leaves for worker in ideal} == {math.inf}
    assert max(worker.presence.joins for worker in ideal) <= 10.0


def test_a_larger_body_takes_longer() -> None:
    link = draw_fleet(Fleet(up_mbit=(8.0, 8.0), down_mbit=(80.0, 80.0), latency_ms=50.0), 10.0, 0)[0].link
    assert link.up_seconds(1_000_000) == 1.05
    assert link.down_seconds(1_000_000) == 0.15000000000000002
