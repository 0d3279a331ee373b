"""Synchronous rounds on the same clock."""

from __future__ import annotations

import numpy as np
import pytest
from simulated import Log, configured, fleet_work, run

from fedmoe.experts import seed_of
from fedmoe.lora.adapter import Adapter, initial_adapter
from fedmoe.lora.codec import digest
from fedmoe.simulation.fleet import draw_fleet

ROUNDS: dict[str, object] = {"kind": "rounds", "local_steps": 10}


def test_a_round_lands_the_mean_of_what_its_workers_learned() -> None:
    config = configured(ROUNDS, fleet={"workers": 3, "slowness": [1, 2, 3]}, seconds=35.0)
    simulated, work = run(config), fleet_work(config)
    layout, alpha = work.manifest.layout, work.manifest.alpha
    start = initial_adapter(layout, alpha, seed_of("expert-0")).flat
    deltas = []
    for profile in draw_fleet(config.fleet, 35.0, 0):
        local = work.worker(profile)
        local.load(start)
        local.train(10)
        deltas.append(local.weights() - start)
    mean = np.mean(deltas, axis=0, dtype=np.float64).astype(np.float32)
    assert simulated.tally.rounds == 1
    assert simulated.tally.accepted == {0: 1, 1: 1, 2: 1}
    assert simulated.digests["expert-0"] == digest(Adapter(layout, alpha, start + mean))


def test_a_round_takes_as_long_as_its_slowest_worker() -> None:
    quick, slow = (
        run(configured(ROUNDS, fleet={"workers": 4, "slowness": slowness}, seconds=100.0)) for slowness in ([1], [1, 8])
    )
    assert quick.tally.rounds == 9
    assert slow.tally.rounds == 1


def test_each_expert_has_rounds_of_its_own() -> None:
    simulated = run(configured(ROUNDS, fleet={"workers": 6, "experts": 2}, seconds=50.0))
    assert simulated.tally.rounds == 8
    assert simulated.versions == {"expert-0": 4, "expert-1": 4}


def test_one_who_leaves_is_not_waited_for_and_late_ones_take_part_from_the_next_round_on() -> None:
    fleet = {"workers": 20, "churn": {"joining": 0.5, "leaving": 0.5}}
    config = configured(ROUNDS, fleet=fleet, seconds=200.0)
    simulated = run(config)
    assert simulated.tally.rounds >= 15
    for profile in draw_fleet(config.fleet, 200.0, 0):
        rounds = (min(profile.presence.leaves, 200.0) - profile.presence.joins) / 10.0
        assert rounds - 4 <= simulated.tally.accepted[profile.number] <= rounds


def test_one_that_is_off_is_waited_for() -> None:
    troubled = {"workers": 10, "outages": {"every": 100, "length": 40}}
    simulated = run(configured(ROUNDS, fleet=troubled, seconds=400.0))
    assert 2 <= simulated.tally.rounds <= 25
    # Whoever was in the last round or not: every round had all ten.
    assert sum(simulated.tally.accepted.values()) == 10 * simulated.tally.rounds


def test_a_cohort_is_a_share_of_those_present() -> None:
    simulated = run(configured({**ROUNDS, "cohort": 0.3}, fleet={"workers": 10}, seconds=95.0))
    assert sum(simulated.tally.accepted.values()) == 3 * simulated.tally.rounds == 27
    assert len(simulated.tally.accepted) > 5


def test_bytes_are_those_of_all_members(log: Log) -> None:
    plain = run(configured(ROUNDS, fleet={"workers": 5}, seconds=55.0))
    coded = run(configured({**ROUNDS, "wire_dtype": "bf16"}, fleet={"workers": 5}, seconds=55.0))
    assert plain.tally.rounds == coded.tally.rounds == 5
    bodies = {len(sent.body) for _, sent, _ in log.pushes}
    assert plain.tally.bytes_up == pytest.approx(25 * bodies.pop())
    assert coded.tally.bytes_up < plain.tally.bytes_up


def test_a_deadline_goes_on_without_those_who_are_late() -> None:
    fleet = {"workers": 4, "slowness": [1, 8], "latency_ms": 1}
    simulated = run(configured({**ROUNDS, "deadline": 15.0}, fleet=fleet, seconds=100.0))
    assert simulated.tally.rounds == 6
    assert simulated.tally.accepted == {0: 6, 2: 6}
    # Who is late stops in the middle: none of its steps was worth anything.
    assert simulated.tally.steps == 120


def test_a_deadline_that_nobody_keeps_waits_for_the_first() -> None:
    fleet = {"workers": 4, "slowness": [1, 8], "latency_ms": 1}
    simulated = run(configured({**ROUNDS, "deadline": 1.0}, fleet=fleet, seconds=52.0))
    assert simulated.tally.rounds == 5
    assert set(simulated.tally.accepted) <= {0, 2}
