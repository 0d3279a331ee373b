"""The laws of the asynchronous scheme: the real coordinator, the real bytes, and nothing from one who is off."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from simulated import Log, configured, fleet_work, run

from fedmoe.coordinator import CentralCoordinator, Submission
from fedmoe.lora.codec import decode, encode
from fedmoe.simulation.config import Fleet
from fedmoe.simulation.fleet import draw_fleet
from fedmoe.simulation.report import make_report

TROUBLED = {
    "workers": 40,
    "experts": 2,
    "slowness": [1, 1, 2, 4, 8],
    "start_within": 10,
    "up_mbit": [0.005, 1],
    "outages": {"every": 30, "length": 10},
    "churn": {"joining": 0.2, "leaving": 0.3},
}


def test_one_worker_gives_what_the_real_coordinator_gives_step_by_step() -> None:
    """Of equal speed and never stale: pushes every ten steps, and one more step while an update travels."""
    config = configured({"sync_interval": 10.0}, fleet={"workers": 1, "latency_ms": 1}, seconds=65.0)
    simulated, work = run(config), fleet_work(config)
    central, profile = CentralCoordinator(), draw_fleet(config.fleet, 65.0, 0)[0]
    central.register_expert("expert-0", work.manifest)
    local, layout = work.worker(profile), work.manifest.layout
    base = central.expert("expert-0").state.weights
    local.load(base)
    for sequence in range(6):
        local.train(9 if sequence else 10)
        sent = local.weights()
        body = encode(layout, sent - base)
        submission = Submission(
            "expert-0", profile.name, "simulated", sequence, sequence, hashlib.sha256(body).hexdigest()
        )
        central.push_update(submission, decode(body, layout).flat)
        local.train(1)
        base = central.expert("expert-0").state.weights
        local.rebase(base, sent)
    assert simulated.versions == {"expert-0": 6}
    assert simulated.tally.staleness == {0: 6}
    assert simulated.digests == {"expert-0": central.expert("expert-0").digest}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_bytes_are_those_of_the_encoded_updates_and_their_replay_gives_the_same_experts(log: Log, dtype: str) -> None:
    config = configured({"wire_dtype": dtype, "max_staleness": 8}, fleet=TROUBLED)
    simulated = run(config)
    assert simulated.tally.bytes_up == sum(len(sent.body) for _, sent, _ in log.pushes)
    assert simulated.tally.stored_bytes == sum(len(sent.body) for sent in log.accepted)
    manifest = fleet_work(config).manifest
    central = CentralCoordinator(config.schemes[0].aggregation())
    for expert in range(2):
        central.register_expert(f"expert-{expert}", manifest)
    made = defaultdict(list)
    for sent in log.accepted:
        delta, name = decode(sent.body, manifest.layout).flat, f"expert-{sent.worker.expert}"
        digest = hashlib.sha256(sent.body).hexdigest()
        norm = math.sqrt(float(np.square(delta, dtype=np.float64).sum()))
        submission = Submission(name, sent.worker.name, "simulated", sent.sequence, sent.base_version, digest, {}, norm)
        update = central.push_update(submission, delta)
        made[name].append(update.version)  # type: ignore[union-attr]
    assert {name: versions == list(range(1, len(versions) + 1)) for name, versions in made.items()} == {
        "expert-0": True,
        "expert-1": True,
    }
    assert simulated.versions == {name: len(versions) for name, versions in made.items()}
    assert simulated.digests == {name: expert.digest for name, expert in central.experts.items()}


def test_a_worker_that_is_off_sends_nothing(log: Log) -> None:
    run(configured(fleet=TROUBLED, seconds=200.0))
    assert len(log.pushes) > 100
    for moment, sent, _ in log.pushes:
        seconds = sent.worker.link.up_seconds(len(sent.body))
        assert sent.worker.presence.worked(moment - seconds, moment) == pytest.approx(seconds)
    fleet = Fleet.model_validate(TROUBLED)
    absent = [worker for worker in draw_fleet(fleet, 200.0, 0) if worker.presence.leaves < math.inf]
    assert absent
    for moment, sent, _ in log.pushes:
        assert sent.worker.presence.joins <= moment <= sent.worker.presence.leaves


def test_an_upload_that_an_outage_cuts_off_is_sent_again() -> None:
    # 40,000 bits a second: an update takes many seconds.
    fleet = TROUBLED | {"up_mbit": [0.002, 0.002], "churn": {}}
    simulated = run(configured(fleet=fleet, seconds=300.0))
    assert simulated.tally.cut_off > 0
    assert sum(simulated.tally.accepted.values()) > 0


def test_the_same_seed_gives_the_same_report() -> None:
    config = configured(fleet=TROUBLED)
    first, second = (make_report(config, 256, [run(config)]) for _ in range(2))
    assert first == second
    other = configured(fleet=TROUBLED, seed=1)
    assert make_report(other, 256, [run(other)])["schemes"] != first["schemes"]


def test_what_a_too_stale_update_brought_travels_with_the_next_one(log: Log) -> None:
    simulated = run(configured({"max_staleness": 1}, fleet={"workers": 10, "slowness": [1, 8]}))
    assert simulated.tally.refused["too_stale"] > 5
    returned: dict[int, int] = defaultdict(int)
    for _, sent, answer in log.pushes:
        carried = returned[sent.worker.number]
        assert sent.learned.steps >= carried
        assert sent.learned.steps > carried or not carried
        returned[sent.worker.number] = sent.learned.steps if answer.returned else 0
    accepted = sum(sent.learned.steps for sent in log.accepted)
    assert accepted + sum(returned.values()) <= simulated.tally.steps


def test_a_slow_worker_takes_fewer_steps_and_pushes_as_often(log: Log) -> None:
    run(configured(fleet={"workers": 2, "slowness": [1, 4]}))
    steps = {number: [s.learned.steps for _, s, _ in log.pushes if s.worker.number == number] for number in (0, 1)}
    assert steps[0][:3] == [10, 10, 10]
    assert steps[1][:3] == [3, 3, 3]


def test_a_buffer_moves_an_expert_only_when_it_is_full() -> None:
    fleet = {"workers": 3, "latency_ms": 1}
    whole = run(configured({"buffer_size": 3}, fleet=fleet, seconds=11.0))
    part = run(configured({"buffer_size": 4}, fleet=fleet, seconds=11.0))
    fresh = run(configured(fleet=fleet, seconds=1.0))
    assert whole.versions == part.versions == {"expert-0": 3}
    assert part.digests == fresh.digests != whole.digests


def test_int8_takes_under_half_of_the_bytes() -> None:
    # Of few numbers the header is most of a body.
    work = {"kind": "recorded", "parameters": 8192}
    plain, coded = (
        run(configured({"wire_dtype": dtype}, fleet={"workers": 1}, work=work)) for dtype in ("fp32", "int8")
    )
    assert coded.tally.bytes_up < plain.tally.bytes_up / 2
    assert coded.versions == plain.versions


def test_a_coordinator_that_takes_one_update_a_second_lets_them_wait(log: Log) -> None:
    config = configured(fleet={"workers": 20, "latency_ms": 1}, updates_per_second=1.0, seconds=40.0)
    simulated = run(config)
    moments = [moment for moment, _, _ in log.pushes]
    assert all(after - before >= 1.0 - 1e-9 for before, after in pairwise(moments))
    assert simulated.tally.longest_queue_seconds > 10.0


def test_five_hundred_workers_land_five_updates_each() -> None:
    """Ten thousand of them are `benchmarks/bench_simulation.py`."""
    fleet = {"workers": 500, "experts": 5, "slowness": [1, 1, 2, 4, 8], "start_within": 10}
    simulated = run(configured(fleet=fleet, seconds=100.0))
    assert min(simulated.tally.accepted[number] for number in range(500)) >= 5
    assert sum(simulated.versions.values()) == sum(simulated.tally.accepted.values()) >= 2500
