"""Workers of two experts that go on from one gateway, on the tiny model over a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from workers import Federation, Setup, blocks, federation, local, tiny_base, wait_for_answer

from fedmoe.datasets.tokens.packing import collate
from fedmoe.distributed_worker import DistributedWorker
from fedmoe.federation.events import Event, ExpertRebased, GatewayMerged, UpdateAccepted
from fedmoe.gateway.evaluate import evaluate
from fedmoe.lora.adapter import Adapter
from fedmoe.models.input_moments import MomentsCollector
from fedmoe.qwen_worker import StepRecord
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.experts import GatewayInfo
from fedmoe.wire.contract.messages import DataStatisticsHeader

MERGE_AFTER = 8
#: Expert -> by how much its data count.
DOMAINS = {"ones": 1, "threes": 3}


@pytest.fixture
def online(tmp_path: Path) -> Iterator[Federation]:
    with federation(tmp_path / "coordinator", start_from="gateway", merge_after=MERGE_AFTER) as running:
        yield running


def setup_of(house: Federation, folder: Path, expert: str, steps: int, pause: float = 0.0) -> Setup:
    """A worker of one expert that tells its input moments, and takes `pause` seconds longer for every step."""

    def slowly(worker: DistributedWorker, record: StepRecord) -> None:
        wait_for_answer(worker, record)
        time.sleep(pause)

    data = blocks(seed=DOMAINS[expert], step=DOMAINS[expert])
    with MomentsCollector(tiny_base(), "all-linear") as collector:
        for _ in range(3):  # so that they are not too few to count
            collector.add(collate(data))
        moments = collector.moments().to_bytes()

    def tell() -> None:
        with CoordinatorClient(house.url) as client:
            client.push_data_statistics(DataStatisticsHeader(expert=expert, worker=expert, kind="moments"), moments)

    return Setup(
        house.url,
        folder / expert,
        expert,
        steps,
        every=2,
        rank=8,
        data=data,
        expert=expert,
        on_registered=tell,
        after_step=slowly,
    )


def run_together(*setups: Setup) -> None:
    threads = [threading.Thread(target=setup.run) for setup in setups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()


def quiet_gateway(house: Federation) -> tuple[GatewayInfo, Adapter]:
    """The gateway once no expert is ready to be merged."""
    deadline = time.monotonic() + 30
    with CoordinatorClient(house.url) as client:
        while True:
            info = client.gateway_info()
            assert info.living is not None
            if all(left.steps < MERGE_AFTER for left in info.living.departures.values()):
                pulled = client.pull_gateway()
                assert pulled is not None
                return info, pulled.adapter
            assert time.monotonic() < deadline
            time.sleep(0.01)


def events(house: Federation, kind: type[Event]) -> list[Event]:
    assert house.house is not None
    return [event for event in house.house.service.journal.events() if isinstance(event, kind)]


def test_two_experts_of_unlike_speed_make_a_gateway_that_knows_what_either_alone_does_not(
    online: Federation, tmp_path: Path
) -> None:
    run_together(setup_of(online, tmp_path, "ones", 64), setup_of(online, tmp_path, "threes", 48, pause=0.03))
    info, gateway = quiet_gateway(online)
    with federation(tmp_path / "apart") as apart:
        run_together(setup_of(apart, tmp_path / "alone", "ones", 64), setup_of(apart, tmp_path / "alone", "threes", 48))
        assert apart.house is not None
        alone = {name: expert.adapter for name, expert in apart.house.service.coordinator.experts.items()}
    held_out = {name: blocks(seed=1000, step=step) for name, step in DOMAINS.items()}
    losses = evaluate(tiny_base(), {"gateway": gateway, **alone}, held_out).losses
    assert losses["gateway"]["threes"] < losses["ones"]["threes"] - 0.2
    assert losses["gateway"]["ones"] < losses["threes"]["ones"] - 0.2
    gateway_merges = [event for event in events(online, GatewayMerged) if isinstance(event, GatewayMerged)]
    assert {name for fold in gateway_merges for name in fold.sources} == {"ones", "threes"}
    assert all(fold.notes == () for fold in gateway_merges), "all had told their input moments"
    assert info.version == gateway_merges[-1].version


def test_a_worker_is_its_expert_bit_for_bit_across_merges(online: Federation, tmp_path: Path) -> None:
    setup = setup_of(online, tmp_path, "ones", 30)
    worker = setup.run()
    assert online.house is not None
    expert = online.house.service.coordinator.expert("ones")
    assert len(events(online, ExpertRebased)) >= 2
    np.testing.assert_array_equal(expert.state.weights, local(worker))


def test_a_worker_goes_on_after_coordinator_and_worker_were_restarted(online: Federation, tmp_path: Path) -> None:
    setup_of(online, tmp_path, "ones", 12).run()
    before, _ = quiet_gateway(online)
    online.stop()
    online.start()
    assert quiet_gateway(online)[0] == before
    worker = setup_of(online, tmp_path, "ones", 24).run()
    after, _ = quiet_gateway(online)
    assert (worker.worker.step, after.version > before.version) == (24, True)
    sequences = [event.sequence for event in events(online, UpdateAccepted) if isinstance(event, UpdateAccepted)]
    assert sequences == list(range(len(sequences)))


def test_a_worker_that_counts_on_a_online_gateway_is_refused_before_it_trains(
    house: Federation, tmp_path: Path
) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=3, start_from="gateway")
    with pytest.raises(RefusedError, match="the worker asks for: gateway"):
        setup.run()
    assert setup.last.worker.step == 0
