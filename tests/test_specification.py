"""The specification's classes under their names (C1 to C7), and its promises on behaviour (D2 to D9) in one place.

The table of all promises with the tests that keep them is docs/specification.md.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from live import House, LiveServer, listening, open_house
from structlog.testing import capture_logs
from support import LAYOUT, MANIFEST, make_body, make_flat, make_submission

from fedmoe.coordinator import Aggregation, CentralCoordinator
from fedmoe.experts import ExpertModel
from fedmoe.federation.events import UpdateAccepted
from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.codec import encode
from fedmoe.lora.update_rules import RULES, polynomial
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import UpdateHeader


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with open_house(tmp_path) as opened:
        yield opened


@pytest.fixture
def server(house: House) -> Iterator[LiveServer]:
    with listening(house.app) as running:
        yield running


def header(worker: str, sequence: int = 0, base_version: int = 0, expert: str = "python") -> UpdateHeader:
    return UpdateHeader(expert=expert, worker=worker, epoch="e1", sequence=sequence, base_version=base_version)


def test_c1_the_central_coordinator_lands_updates_and_makes_the_gateway() -> None:
    from fedmoe.coordinator import GatewayModel

    coordinator = CentralCoordinator(enable_gateway=True)
    coordinator.register_expert("python", MANIFEST)
    accepted = coordinator.push_update(make_submission(), make_flat(1))
    gateway = coordinator.gateway()
    assert isinstance(gateway, GatewayModel)
    assert isinstance(accepted, UpdateAccepted)
    assert (accepted.version, gateway.version, dict(gateway.sources)) == (1, 2, {"python": 1})


def test_c2_an_expert_model_is_a_value_whose_version_rises_by_one() -> None:
    expert = ExpertModel.initial("python", MANIFEST, 1, RULES["sgd"])
    after = expert.land(make_flat(2), 1.0, RULES["sgd"])
    assert (expert.version, after.version) == (0, 1)
    np.testing.assert_array_equal(after.state.weights, expert.state.weights + make_flat(2))


def test_c3_the_distributed_coordinator_keeps_what_it_accepted(tmp_path: Path) -> None:
    from fedmoe.config import CoordinatorConfig
    from fedmoe.distributed_coordinator import DistributedCoordinator

    config = CoordinatorConfig(state_dir=str(tmp_path / "state"))
    first = DistributedCoordinator(config)
    with listening(first.app) as server, CoordinatorClient(server.url, attempts=1) as api:
        first.service.start()
        api.register("python", "w1", MANIFEST)
        api.push(header("w1"), make_body(1))
    digest = first.service.coordinator.expert("python").digest
    first.close()
    second = DistributedCoordinator(config)
    try:
        assert second.service.coordinator.expert("python").digest == digest
    finally:
        second.close()


def test_c4_c5_c6_the_worker_side_is_there_under_its_names() -> None:
    pytest.importorskip("torch")
    from fedmoe.datasets.formats.samples import Text
    from fedmoe.datasets.tokens.packing import BlockSampler, pack
    from fedmoe.datasets.tokens.tokenization import tokenize_samples
    from fedmoe.distributed_worker import DistributedWorker
    from fedmoe.models.base import load_base
    from fedmoe.qwen_finetune import LoraConfig, QwenLoRAExpert
    from fedmoe.qwen_worker import QwenWorker

    base = load_base("tiny", "cpu", "fp32")
    expert = QwenLoRAExpert(base, LoraConfig(2, 4.0))
    texts = [Text(line, "some text to learn by heart") for line in range(8)]
    blocks = pack(tokenize_samples(texts, base.tokenizer, 64).samples, 64, 0, base.tokenizer.pad_token_id)
    before = expert.evaluate(blocks, 2).loss
    worker = QwenWorker(expert, BlockSampler(blocks, 0))
    trained = worker.train_for(60.0, lambda: False, lambda _: None, max_steps=8)
    assert trained.steps == 8
    assert expert.evaluate(blocks, 2).loss < before
    assert callable(DistributedWorker.run)
    assert callable(DistributedWorker.stop)


def test_c7_the_parameters_are_in_one_module() -> None:
    from fedmoe import config

    worker = config.WorkerConfig(coordinator_url="http://h:1", worker_id="w", specialty="python", dataset="d.jsonl")
    assert (config.CoordinatorConfig().port, worker.sync_interval) == (5000, 10.0)


def test_d2_an_update_lands_with_learning_rate_and_decay_by_version_difference() -> None:
    coordinator = CentralCoordinator(Aggregation(server_learning_rate=0.5, staleness="polynomial"))
    weights = coordinator.register_expert("python", MANIFEST).state.weights
    for sequence in range(3):  # all three were made from version 0
        accepted = coordinator.push_update(make_submission(sequence=sequence), make_flat(sequence))
        assert isinstance(accepted, UpdateAccepted)
        assert accepted.staleness == sequence
        assert accepted.coefficient == 0.5 * polynomial(sequence)
        weights = weights + np.float32(accepted.coefficient) * make_flat(sequence)
    np.testing.assert_array_equal(coordinator.expert("python").state.weights, weights)


def test_d3_every_accepted_update_reaches_the_gateway_by_itself() -> None:
    coordinator = CentralCoordinator()
    coordinator.register_expert("python", MANIFEST)
    seen = []
    for version in range(3):
        coordinator.push_update(make_submission(base_version=version, sequence=version), make_flat(version))
        gateway = coordinator.gateway()
        seen.append((gateway.version, gateway.sources["python"], gateway.digest))
    assert [(version, source) for version, source, _ in seen] == [(2, 1), (3, 2), (4, 3)]
    assert len({digest for _, _, digest in seen}) == 3


@pytest.mark.parametrize(("strategy", "weight"), [("weighted_average", 0.5), ("sum", 1.0)])
def test_d4_d5_the_gateway_is_the_weighted_sum_of_products(strategy: str, weight: float) -> None:
    coordinator = CentralCoordinator(Aggregation(strategy=strategy))
    for name in ("python", "sql"):
        coordinator.register_expert(name, MANIFEST)
        coordinator.push_update(make_submission(name, worker=name), make_flat(len(name)))
    merged, experts = coordinator.gateway().adapter, coordinator.experts.values()
    for module in LAYOUT.modules:
        a, b = merged.module(module.name)
        factors = [(expert.adapter.scale, *expert.adapter.module(module.name)) for expert in experts]
        expected = sum(weight * scale * b_k @ a_k for scale, a_k, b_k in factors)
        np.testing.assert_allclose(merged.scale * b @ a, expected, rtol=1e-5, atol=1e-8)


def test_d6_many_workers_push_at_once_and_every_update_counts(house: House, server: LiveServer) -> None:
    experts, pushes = ("python", "sql"), 5
    house.register(*experts)
    errors: list[Exception] = []

    def work(worker: str, expert: str) -> None:
        try:
            with CoordinatorClient(server.url) as api:
                for sequence in range(pushes):
                    api.push(header(worker, sequence, expert=expert), make_body(sequence))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(f"w{i}", experts[i % 2])) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {name: expert.version for name, expert in house.service.coordinator.experts.items()} == {
        "python": 3 * pushes,
        "sql": 3 * pushes,
    }


def test_d7_another_lora_configuration_is_refused_naming_the_difference() -> None:
    coordinator = CentralCoordinator()
    coordinator.register_expert("python", MANIFEST)
    with pytest.raises(RefusedError, match=r"rank: expected 2, got 3.*--lora-r") as refused:
        coordinator.register_expert("sql", replace(MANIFEST, layout=LAYOUT.with_rank(3)))
    assert refused.value.code == "lora_mismatch"
    other = replace(MANIFEST.base, weights_hash="c" * 64)
    with pytest.raises(RefusedError, match="one base model") as refused:
        coordinator.register_expert("sql", replace(MANIFEST, base=other))
    assert refused.value.code == "base_mismatch"


def test_d9_what_goes_wrong_is_told_in_the_error_and_in_the_log(house: House, server: LiveServer) -> None:
    """D9: "gateway not initialised", "shape mismatch" and "update not aggregated"."""
    with capture_logs() as log, CoordinatorClient(server.url, attempts=1) as api:
        with pytest.raises(RefusedError, match=r"Start at least one worker") as refused:
            api.gateway_info()
        assert refused.value.code == "gateway_not_initialised"
        api.register("python", "w1", MANIFEST)
        wide = Layout((ModuleShape("layers.0.q", 7, 4), ModuleShape("layers.0.v", 6, 3)), 2)
        with pytest.raises(RefusedError, match=r"layers\.0\.q\.lora_A.*\[?2, 6"):
            api.push(header("w1"), encode(wide, make_flat(1, wide)))
        api.push(header("w1"), make_body(1))
        with pytest.raises(RefusedError, match="version 5") as refused:
            api.push(header("w1", 1, base_version=5), make_body(2))
        assert refused.value.code == "unknown_version"
    refusals = [entry for entry in log if entry["event"] == "refused"]
    assert [entry["code"] for entry in refusals] == ["shape_mismatch", "unknown_version"]
    assert all(entry["worker"] == "w1" and entry["reason"] for entry in refusals)
    updates = [entry for entry in log if entry["event"] == "update"]
    assert [(entry["expert"], entry["worker"], entry["version"]) for entry in updates] == [("python", "w1", 1)]


def test_b6_d9_without_a_gateway_updates_still_land_and_the_answer_names_the_option() -> None:
    coordinator = CentralCoordinator(enable_gateway=False)
    coordinator.register_expert("python", MANIFEST)
    accepted = coordinator.push_update(make_submission(), make_flat(1))
    assert isinstance(accepted, UpdateAccepted)
    assert accepted.version == 1
    with pytest.raises(RefusedError, match="--enable-gateway") as refused:
        coordinator.gateway()
    assert refused.value.code == "gateway_disabled"
