"""What every rollout engine does (E6), whatever it runs on: one suite over all implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import fake_vllm
import numpy as np
import pytest
from builders import random_adapter, smollm2_layout

from fedmoe.inference.engine import AdapterKey, Engine, EngineError, Sample, SampleRequest
from fedmoe.inference.verify import Probe, verify_sync
from fedmoe.inference.vllm.engine import VllmEngine
from fedmoe.inference.vllm.server import SERVED_NAME, VllmServer
from fedmoe.lora.adapter import Adapter

ONE, TWO, THREE = AdapterKey("poet", 0), AdapterKey("critic", 0), AdapterKey("judge", 4)
KEYS = (ONE, TWO, THREE)


@dataclass(frozen=True)
class Bench:
    """An engine under test: random adapters by seed for its model, prompts, and how exactly it computes (nats)."""

    engine: Engine
    adapter: Callable[[int], Adapter]
    prompts: tuple[tuple[int, ...], ...]
    tolerance: float

    def load(self, *keys: AdapterKey) -> None:
        for seed, key in enumerate(keys):
            self.engine.load(key, self.adapter(seed))

    def request(self, key: AdapterKey | None, prompt: int = 0, seed: int = 0) -> SampleRequest:
        return SampleRequest(key, self.prompts[prompt], 6, 1.0, seed)

    def score(self, key: AdapterKey | None) -> np.ndarray:
        return self.engine.score(key, self.prompts[0], self.prompts[1][:4])


def fake_bench(folder: Path) -> Bench:
    engine = VllmEngine("http://fake", fake_vllm.MODEL, folder, transport=fake_vllm.FakeVllm().transport)
    return Bench(engine, fake_vllm.make_adapter, ((3, 1, 4, 1, 5), (9, 2, 6, 5, 3, 5), (8, 9, 7)), 1e-4)


def vllm_bench(folder: Path, server: VllmServer) -> Bench:
    layout = smollm2_layout()
    prompts = (tuple(range(504, 520)), tuple(range(1000, 1024)), tuple(range(2000, 2012)))
    engine = VllmEngine(server.url, SERVED_NAME, folder)
    return Bench(engine, lambda seed: random_adapter(layout, seed, 0.02), prompts, 1e-3)


def transformers_bench() -> Bench:
    from fedmoe.inference.transformers_engine import TransformersEngine
    from fedmoe.models.base import load_base
    from fedmoe.models.multilora import MultiLora

    base = load_base("tiny", device="cpu", dtype="fp32")
    multi = MultiLora(base.model)
    layout = multi.layout(4)
    prompts = (tuple(range(60, 70)), tuple(range(90, 108)), tuple(range(97, 102)))
    return Bench(TransformersEngine(base, multi), lambda seed: random_adapter(layout, seed, 0.1), prompts, 1e-4)


def fleet_bench() -> Bench:
    from fleets import LocalLauncher

    from fedmoe.inference.fleet import FleetEngine

    one = transformers_bench()
    return replace(one, engine=FleetEngine(LocalLauncher(lambda: transformers_bench().engine), 2, 3))


@pytest.fixture(params=["fake", pytest.param("vllm", marks=pytest.mark.vllm), "transformers", "fleet"])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    if request.param == "fake":
        made = fake_bench(tmp_path)
    elif request.param == "vllm":
        made = vllm_bench(tmp_path, request.getfixturevalue("vllm_server"))
    else:
        made = transformers_bench() if request.param == "transformers" else fleet_bench()
    yield made
    made.engine.close()


def assert_scored(bench: Bench, request: SampleRequest, sample: Sample) -> None:
    """The sample's log-probabilities are what the engine says of these tokens under the same adapter."""
    scored = bench.engine.score(request.adapter, request.prompt, sample.tokens)
    np.testing.assert_allclose(sample.logprobs, scored, atol=bench.tolerance, rtol=0)


def test_an_engine_holds_what_was_loaded_until_it_is_unloaded(bench: Bench) -> None:
    assert bench.engine.loaded() == frozenset()
    bench.load(ONE, TWO)
    assert bench.engine.loaded() == {ONE, TWO}
    bench.engine.unload(ONE)
    assert bench.engine.loaded() == {TWO}


def test_loading_a_key_again_is_an_error_and_changes_nothing(bench: Bench) -> None:
    bench.load(ONE)
    before = bench.score(ONE)
    with pytest.raises(EngineError, match="poet@0"):
        bench.engine.load(ONE, bench.adapter(5))
    np.testing.assert_array_equal(bench.score(ONE), before)


def test_unloading_an_unknown_key_is_an_error(bench: Bench) -> None:
    with pytest.raises(EngineError, match="critic@0"):
        bench.engine.unload(TWO)


def test_an_adapter_that_is_not_loaded_is_refused_by_name(bench: Bench) -> None:
    bench.load(ONE)
    with pytest.raises(EngineError, match="critic@0"):
        bench.engine.sample([bench.request(ONE), bench.request(TWO)])
    with pytest.raises(EngineError, match="poet@1"):
        bench.engine.score(AdapterKey("poet", 1), bench.prompts[0], (1, 2))


def test_no_requests_give_no_samples(bench: Bench) -> None:
    assert bench.engine.sample([]) == []


def test_samples_have_a_log_probability_for_every_token(bench: Bench) -> None:
    bench.load(ONE)
    requests = [bench.request(ONE, prompt, seed) for prompt in range(3) for seed in range(2)]
    for request, sample in zip(requests, bench.engine.sample(requests), strict=True):
        assert 1 <= len(sample.tokens) <= request.max_new_tokens
        assert sample.stopped or len(sample.tokens) == request.max_new_tokens
        assert sample.logprobs.dtype == np.float32
        assert sample.logprobs.shape == (len(sample.tokens),)
        assert np.isfinite(sample.logprobs).all()
        assert (sample.logprobs <= 0).all()


def test_one_batch_over_all_policies_and_the_base_keeps_them_apart(bench: Bench) -> None:
    bench.load(*KEYS)
    requests = [bench.request(key, prompt, seed=prompt) for prompt in range(3) for key in (*KEYS, None)]
    samples = bench.engine.sample(requests)
    for request, sample in zip(requests, samples, strict=True):
        assert_scored(bench, request, sample)
    scores = [bench.score(key) for key in (*KEYS, None)]
    apart = [float(np.abs(a - b).max()) for i, a in enumerate(scores) for b in scores[:i]]
    assert min(apart) > 10 * bench.tolerance


def test_the_seed_fixes_the_draw(bench: Bench) -> None:
    bench.load(ONE)
    drawn = bench.engine.sample([bench.request(ONE, seed=seed) for seed in (*range(6), *range(6))])
    assert [sample.tokens for sample in drawn[:6]] == [sample.tokens for sample in drawn[6:]]
    assert len({sample.tokens for sample in drawn}) > 1


def test_temperature_zero_takes_the_likeliest_token_at_the_log_probabilities_of_one(bench: Bench) -> None:
    bench.load(ONE)
    requests = [replace(bench.request(ONE, seed=seed), temperature=0.0) for seed in range(3)]
    samples = bench.engine.sample(requests)
    assert len({sample.tokens for sample in samples}) == 1
    assert_scored(bench, requests[0], samples[0])
    others = bench.engine.sample([replace(bench.request(ONE, seed=seed), max_new_tokens=1) for seed in range(8)])
    likeliest = bench.engine.score(ONE, bench.prompts[0], samples[0].tokens[:1])[0]
    assert all(other.logprobs[0] <= likeliest + bench.tolerance for other in others)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_log_probabilities_are_those_at_the_requests_temperature(bench: Bench, temperature: float) -> None:
    bench.load(ONE)
    requests = [replace(bench.request(ONE, seed=seed), temperature=temperature, max_new_tokens=1) for seed in range(16)]
    drawn = {sample.tokens: float(sample.logprobs[0]) for sample in bench.engine.sample(requests)}
    plain = {tokens: float(bench.engine.score(ONE, bench.prompts[0], tokens)[0]) for tokens in drawn}
    first, *others = drawn
    assert others, "one token only was drawn; nothing to compare"
    for token in others:
        # log softmax(z / T): two tokens are 1/T as far apart as at temperature 1.
        apart = (plain[token] - plain[first]) / temperature
        assert drawn[token] - drawn[first] == pytest.approx(apart, abs=4 * bench.tolerance / min(1.0, temperature))


def test_an_adapter_of_zeros_is_the_base_model(bench: Bench) -> None:
    bench.engine.load(ONE, Adapter.zeros(bench.adapter(0).layout, 8.0))
    np.testing.assert_allclose(bench.score(ONE), bench.score(None), atol=bench.tolerance, rtol=0)


def test_a_new_version_replaces_the_old_one(bench: Bench) -> None:
    bench.load(ONE, TWO)
    old, other = bench.score(ONE), bench.score(TWO)
    newer = AdapterKey("poet", 1)
    bench.engine.load(newer, bench.adapter(9))
    np.testing.assert_array_equal(bench.score(ONE), old)
    bench.engine.unload(ONE)
    assert float(np.abs(bench.score(newer) - old).max()) > 10 * bench.tolerance
    np.testing.assert_array_equal(bench.score(TWO), other)
    with pytest.raises(EngineError, match="poet@0"):
        bench.engine.sample([bench.request(ONE)])


def test_a_synchronisation_is_verified_against_the_trainer_and_the_version_before(bench: Bench) -> None:
    bench.load(ONE)
    newer = AdapterKey("poet", 1)
    bench.engine.load(newer, bench.adapter(7))
    probes = [Probe(bench.prompts[0], bench.prompts[1][:4]), Probe(bench.prompts[2], bench.prompts[1][:5])]
    trainer = [bench.engine.score(newer, probe.prompt, probe.tokens) for probe in probes]
    found = verify_sync(bench.engine, trainer, newer, probes, 10 * bench.tolerance, previous_key=ONE)
    assert found.largest_gap <= bench.tolerance
    assert found.change is not None
    assert found.change > 10 * bench.tolerance
    with pytest.raises(EngineError, match=r"poet@0 are up to .* nats off"):
        verify_sync(bench.engine, trainer, ONE, probes, 10 * bench.tolerance)


def test_closing_lets_all_versions_go(bench: Bench) -> None:
    bench.load(ONE, TWO)
    bench.engine.close()
    bench.engine.close()
    assert bench.engine.loaded() == frozenset()
