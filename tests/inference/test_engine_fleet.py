"""Several replicas as one engine: the same samples whatever their number, and when some of them die."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders import random_adapter
from fleets import LocalLauncher
from structlog.testing import capture_logs

from fedmoe.inference.engine import AdapterKey, EngineError, Sample, SampleRequest
from fedmoe.inference.fleet import FleetEngine, ReplicaLostError
from fedmoe.inference.transformers_engine import TransformersEngine
from fedmoe.inference.verify import Probe, verify_sync
from fedmoe.lora.adapter import Adapter, Layout
from fedmoe.models.base import load_base
from fedmoe.models.multilora import MultiLora
from fedmoe.models.sampling import SamplingLimits

KEYS = tuple(AdapterKey(name, 0) for name in ("ann", "bob", "cy"))
ROWS = 4
PROBES = (Probe(tuple(range(60, 70)), (65, 66, 67)), Probe((97, 98, 99), (70, 80)))
Fleet = Callable[..., FleetEngine]


def made_engine(rows: int = ROWS) -> TransformersEngine:
    base = load_base("tiny", "cpu", "fp32")
    return TransformersEngine(base, MultiLora(base.model), SamplingLimits(rows=rows))


@pytest.fixture(scope="module")
def layout() -> Layout:
    return MultiLora(load_base("tiny", "cpu", "fp32").model).layout(4)


def adapter(layout: Layout, seed: int) -> Adapter:
    return random_adapter(layout, seed, 0.1)


def asked() -> list[SampleRequest]:
    """22 requests of three adapters and the base model, with prompts of many lengths."""
    lengths = np.random.default_rng(0).integers(3, 20, 22)
    keys = (*KEYS, None)
    return [
        SampleRequest(keys[index % 4], tuple(range(60, 60 + int(length))), 8, 1.0, index)
        for index, length in enumerate(lengths)
    ]


def bits(samples: list[Sample]) -> list[tuple[tuple[int, ...], bytes, bool]]:
    return [(sample.tokens, sample.logprobs.tobytes(), sample.stopped) for sample in samples]


@pytest.fixture
def fleet(layout: Layout) -> Iterator[Fleet]:
    """Fleets with all keys loaded, closed at the end."""
    engines: list[FleetEngine] = []

    def make(launcher: LocalLauncher, count: int) -> FleetEngine:
        engines.append(FleetEngine(launcher, count, ROWS))
        for seed, key in enumerate(KEYS):
            engines[-1].load(key, adapter(layout, seed))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def alone(layout: Layout) -> list[tuple[tuple[int, ...], bytes, bool]]:
    """What a single engine with as many rows samples."""
    engine = made_engine()
    for seed, key in enumerate(KEYS):
        engine.load(key, adapter(layout, seed))
    return bits(engine.sample(asked()))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_samples_are_those_of_one_engine_bit_for_bit(count: int, fleet: Fleet, alone: object) -> None:
    launcher = LocalLauncher(made_engine)
    assert bits(fleet(launcher, count).sample(asked())) == alone
    assert sum(replica.samples for replica in launcher.made) == 6


def test_batches_of_other_rows_have_other_last_bits(layout: Layout, alone: list[object]) -> None:
    # Why batches must be cut alike: if this no longer holds, they need not be.
    engine = made_engine(rows=22)
    for seed, key in enumerate(KEYS):
        engine.load(key, adapter(layout, seed))
    assert torch.get_num_threads() == 1
    assert bits(engine.sample(asked())) != alone


def test_the_weights_of_a_version_are_stored_once(fleet: Fleet) -> None:
    launcher = LocalLauncher(made_engine)
    fleet(launcher, 3)
    assert len(launcher.stored) == len(KEYS)
    assert [replica.engine.loaded() for replica in launcher.made] == [frozenset(KEYS)] * 3


@pytest.mark.parametrize("deaths", [(1,), (2, None, 1), (1, 1, None, 1)])
def test_replicas_that_die_cost_a_retry_and_change_nothing(
    deaths: tuple[int | None, ...], fleet: Fleet, alone: object
) -> None:
    launcher = LocalLauncher(made_engine, deaths)
    engine = fleet(launcher, 2)
    samples = [bits(engine.sample(asked())) for _ in range(3)]
    assert samples == [alone] * 3
    died = [replica for replica in launcher.made if replica.dead]
    assert 1 <= len(died) == len(launcher.made) - 2


def test_one_that_dies_again_and_again_ends_in_words_and_the_others_go_on(fleet: Fleet, alone: object) -> None:
    launcher = LocalLauncher(made_engine, [1, 1, 1])
    engine = fleet(launcher, 1)
    with pytest.raises(EngineError, match=r"replica 0 died 3 times in a row, the last time by: its process is gone"):
        engine.sample(asked())
    assert bits(engine.sample(asked())) == alone


def test_a_replica_that_comes_later_has_all_versions_and_proves_them(fleet: Fleet, layout: Layout) -> None:
    launcher = LocalLauncher(made_engine, [1])
    engine = fleet(launcher, 1)
    newer = AdapterKey("ann", 1)
    engine.load(newer, adapter(layout, 9))
    references = [engine.score(newer, probe.prompt, probe.tokens) for probe in PROBES]
    verify_sync(engine, references, newer, PROBES, 1e-4, previous_key=KEYS[0])
    engine.unload(KEYS[0])
    engine.sample([replace(asked()[1], adapter=newer)])
    first, second = launcher.made
    assert first.dead
    assert second.engine.loaded() == {*KEYS[1:], newer}
    assert [(proof.key, proof.previous_key) for proof in second.proofs] == [(newer, None)]


def test_a_version_is_proved_by_every_replica(fleet: Fleet, layout: Layout) -> None:
    launcher = LocalLauncher(made_engine)
    engine = fleet(launcher, 3)
    references = [engine.score(KEYS[0], probe.prompt, probe.tokens) for probe in PROBES]
    report = verify_sync(engine, references, KEYS[0], PROBES, 1e-4)
    assert (report.largest_gap, report.change) == (0.0, None)
    # One of them holds other weights than it should.
    launcher.made[2].engine.unload(KEYS[0])
    launcher.made[2].engine.load(KEYS[0], adapter(layout, 5))
    with pytest.raises(EngineError, match=r"ann@0 are up to .* nats off"):
        verify_sync(engine, references, KEYS[0], PROBES, 1e-4)


def test_a_replica_with_other_weights_under_a_key_is_refused(fleet: Fleet, layout: Layout) -> None:
    launcher = LocalLauncher(made_engine)
    engine = fleet(launcher, 2)
    launcher.made[1].load = lambda key, weights: "0" * 64  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="a replica has other weights for ann@1"):
        engine.load(AdapterKey("ann", 1), adapter(layout, 1))
    assert engine.loaded() == set(KEYS)
    assert launcher.made[0].engine.loaded() == set(KEYS)


def test_where_one_cannot_be_started_the_others_are_ended() -> None:
    class Full(LocalLauncher):
        def start(self, number: int):  # type: ignore[no-untyped-def]
            if number == 1:
                raise ReplicaLostError("replica 1: it died while it was loading")
            return super().start(number)

    launcher = Full(made_engine)
    with pytest.raises(EngineError, match="it died while it was loading"):
        FleetEngine(launcher, 2, ROWS)
    [only] = launcher.made
    assert only.engine.loaded() == frozenset()


def test_replicas_without_a_batch_are_spoken_of_once(fleet: Fleet) -> None:
    engine = fleet(LocalLauncher(made_engine), 4)
    with capture_logs() as logs:
        for _ in range(2):
            engine.sample(asked()[:8])
    [line] = [line for line in logs if line["event"] == "replicas_idle"]
    assert line["reason"].startswith("8 requests make 2 batches of at most 4 rows, for 4 replicas; lower [engine] rows")
