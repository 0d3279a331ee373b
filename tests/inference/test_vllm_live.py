"""The engine on a real vLLM server with the embedded model (E6, E8): our own numbers, and no old weights ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from builders import random_adapter, smollm2_layout
from vllm_bench import POLICIES, RANK, STALENESS

from fedmoe.inference.engine import AdapterKey, EngineError, SampleRequest
from fedmoe.inference.verify import Probe, verify_sync
from fedmoe.inference.vllm.engine import VllmEngine
from fedmoe.inference.vllm.server import SERVED_NAME, VllmServer, loras_needed
from fedmoe.lora.adapter import Adapter, FloatArray, initial_adapter
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.lora_layers import ALL_LINEAR, AttachedAdapter, attach

pytestmark = pytest.mark.vllm

#: Nats per token between vLLM and our model, both float32: other kernels, other orders of summation. Measured: 4e-5.
TOLERANCE = 5e-4
POET, CRITIC, JUDGE = AdapterKey("poet", 0), AdapterKey("critic", 0), AdapterKey("judge", 0)
LAYOUT = smollm2_layout(RANK)
#: Longer than a block of the prefix cache (128 tokens), so that the cache is used.
LONG = tuple(int(token) for token in np.random.default_rng(1).integers(500, 40_000, 300))
PROBES = (Probe(LONG[:20], LONG[20:36]), Probe(LONG[100:108], LONG[108:120]))


def adapter(seed: int, rank: int = RANK) -> Adapter:
    return random_adapter(LAYOUT.with_rank(rank), seed, 0.02)


@dataclass(frozen=True)
class Trainer:
    """Our own model in float32, whose numbers the server must give."""

    base: LoadedBase
    attached: AttachedAdapter

    def score(self, weights: Adapter | None, prompt: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        self.attached.load(initial_adapter(LAYOUT, 2 * RANK, 0) if weights is None else weights)
        return self._score(prompt, tokens)

    def _score(self, prompt: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        with torch.inference_mode():
            logits = self.base.model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        return np.asarray(chosen.numpy(), np.float32)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    base = load_base("smollm2", device="cpu", dtype="fp32")
    return Trainer(base, attach(base.model, ALL_LINEAR, RANK, 2.0 * RANK))


@pytest.fixture
def engine(vllm_server: VllmServer, tmp_path: Path) -> Iterator[VllmEngine]:
    with VllmEngine(vllm_server.url, SERVED_NAME, tmp_path / "adapters") as made:
        yield made


def request(key: AdapterKey | None, prompt: Sequence[int] = LONG[:24], tokens: int = 8) -> SampleRequest:
    return SampleRequest(key, tuple(prompt), tokens, 1.0, seed=5)


def test_one_batch_over_three_policies_and_the_base_has_our_own_models_numbers(
    engine: VllmEngine, trainer: Trainer
) -> None:
    # Every slot of the server has held something: a request for the base model must not get what is left there.
    for version in range(loras_needed(POLICIES, STALENESS)):
        engine.load(AdapterKey("former", version), adapter(50 + version))
        engine.unload(AdapterKey("former", version))
    weights = {POET: adapter(1), CRITIC: adapter(2), JUDGE: adapter(3)}
    for key, value in weights.items():
        engine.load(key, value)
    requests = [request(key, LONG[start : start + 24]) for start in (0, 50, 90) for key in (*weights, None)]
    for asked, sample in zip(requests, engine.sample(requests), strict=True):
        own = trainer.score(weights[asked.adapter] if asked.adapter else None, asked.prompt, sample.tokens)
        np.testing.assert_allclose(sample.logprobs, own, atol=TOLERANCE, rtol=0)
    own = trainer.score(weights[POET], LONG[:20], LONG[20:40])
    assert float(np.abs(own - trainer.score(None, LONG[:20], LONG[20:40])).max()) > 100 * TOLERANCE


@pytest.mark.parametrize("temperature", [0.6, 1.7])
def test_log_probabilities_are_our_own_at_that_temperature(
    engine: VllmEngine, trainer: Trainer, temperature: float
) -> None:
    engine.load(POET, adapter(1))
    asked = replace(request(POET), temperature=temperature)
    (sample,) = engine.sample([asked])
    trainer.attached.load(adapter(1))
    with torch.inference_mode():
        tokens = torch.tensor([[*asked.prompt, *sample.tokens]])
        logits = trainer.base.model(tokens).logits[0, len(asked.prompt) - 1 : -1] / temperature
    own = logits.log_softmax(-1).gather(1, torch.tensor(sample.tokens)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(sample.logprobs, own, atol=TOLERANCE / temperature, rtol=0)


def test_a_rank_below_the_servers_serves_as_it_is(engine: VllmEngine, trainer: Trainer) -> None:
    engine.load(POET, adapter(1, rank=3))
    own = trainer.score(adapter(1, rank=3), *astuple(PROBES[0]))
    np.testing.assert_allclose(engine.score(POET, *astuple(PROBES[0])), own, atol=TOLERANCE, rtol=0)


def astuple(probe: Probe) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return probe.prompt, probe.tokens


def test_every_synchronisation_is_verified_and_old_weights_never_come_out_of_the_cache(
    engine: VllmEngine, trainer: Trainer
) -> None:
    previous: AdapterKey | None = None
    for version in range(4):
        key, weights = AdapterKey("poet", version), adapter(10 + version)
        engine.load(key, weights)
        own = [trainer.score(weights, *astuple(probe)) for probe in PROBES]
        found = verify_sync(engine, own, key, PROBES, TOLERANCE, previous)
        assert found.change is None or found.change > 100 * TOLERANCE
        # The same long prompt at every version, twice: the second time it comes out of the prefix cache.
        for _ in range(2):
            (sample,) = engine.sample([request(key, LONG)])
            np.testing.assert_allclose(
                sample.logprobs, trainer.score(weights, LONG, sample.tokens), atol=TOLERANCE, rtol=0
            )
        if previous is not None:
            engine.unload(previous)
        previous = key


def test_a_prompt_is_scored_while_others_are_sampled(engine: VllmEngine, trainer: Trainer) -> None:
    # In one batch with them it would end the server: "einsum(): subscript b has size ...".
    engine.load(POET, adapter(1))
    engine.load(CRITIC, adapter(2))
    own = trainer.score(adapter(1), *astuple(PROBES[0]))
    wanted = [request(key, LONG[start : start + 24]) for start in range(0, 16, 4) for key in (POET, CRITIC)]
    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(lambda: [engine.sample(wanted) for _ in range(3)])
        scores = []
        while not sampling.done():
            scores.append(engine.score(POET, *astuple(PROBES[0])))
        first, *others = sampling.result()
    assert len(scores) >= 3
    for score in scores:
        np.testing.assert_allclose(score, own, atol=TOLERANCE, rtol=0)
    assert all([one.tokens for one in other] == [one.tokens for one in first] for other in others)


def test_weights_that_are_not_the_trainers_are_caught(engine: VllmEngine, trainer: Trainer) -> None:
    engine.load(POET, adapter(1))
    other = [trainer.score(adapter(2), *astuple(probe)) for probe in PROBES]
    with pytest.raises(EngineError, match="poet@0 are up to"):
        verify_sync(engine, other, POET, PROBES, TOLERANCE)


def test_an_unloaded_version_is_gone_on_the_server_too(engine: VllmEngine, vllm_server: VllmServer) -> None:
    engine.load(POET, adapter(1))
    engine.load(CRITIC, adapter(2))
    engine.unload(POET)
    with pytest.raises(EngineError, match="not loaded: poet@0; loaded: critic@0"):
        engine.sample([request(CRITIC), request(POET)])
    served = [name.rpartition(".")[0] for name in engine.client.models() if name != SERVED_NAME]
    assert sorted(served) == ["critic@0", "zeros@0"]
    assert vllm_server.running()


def test_what_the_server_cannot_hold_is_refused_and_it_lives_on(engine: VllmEngine) -> None:
    with pytest.raises(
        EngineError, match=r"rank 9 is greater than max_lora_rank.*start the server with --max-lora-rank"
    ):
        engine.load(POET, adapter(1, rank=9))
    room = loras_needed(POLICIES, STALENESS) - 1
    for version in range(room):
        engine.load(AdapterKey("poet", version), adapter(version))
    with pytest.raises(EngineError, match=f"at most {room + 1} adapters"):
        engine.load(CRITIC, adapter(1))
    samples = engine.sample([request(AdapterKey("poet", version), tokens=2) for version in range(room)])
    assert len({tuple(sample.logprobs.tolist()) for sample in samples}) == room


def test_more_prompt_tokens_than_one_step_takes_do_not_end_the_server(engine: VllmEngine) -> None:
    requests = [replace(request(None, LONG[i : i + 90], tokens=1), seed=i) for i in range(60)]
    assert len(engine.sample(requests)) == 60


def test_the_server_listens_on_loopback_only(engine: VllmEngine, vllm_server: VllmServer) -> None:
    leader = psutil.Process(vllm_server.pid)
    sockets = [one for process in (leader, *leader.children(recursive=True)) for one in process.net_connections("inet")]
    listening = {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_twenty_swaps_under_load_serve_every_request_with_the_version_it_names(
    engine: VllmEngine, trainer: Trainer
) -> None:
    kinds = [adapter(1), adapter(2)]
    current = {name: AdapterKey(name, 0) for name in ("poet", "critic")}
    for key in current.values():
        engine.load(key, kinds[0])
    prompt = LONG[:150]
    greedy = replace(request(None, prompt, tokens=4), temperature=0.0)
    served: list[tuple[AdapterKey, FloatArray, tuple[int, ...]]] = []
    with sampling(lambda: served.extend(answers(engine, greedy, list(current.values())))) as errors:
        for step in range(1, 11):
            for name in ("poet", "critic"):
                old, new = current[name], AdapterKey(name, step)
                engine.load(new, kinds[step % 2])
                current[name] = new
                if step > 1:
                    engine.unload(AdapterKey(name, old.version - 1))
    assert errors == []
    assert len({key for key, _, _ in served}) > 10
    own = {(key.version % 2, tokens): logprobs for key, logprobs, tokens in served}
    for (kind, tokens), _ in list(own.items()):
        own[kind, tokens] = trainer.score(kinds[kind], prompt, tokens)
    for key, logprobs, tokens in served:
        np.testing.assert_allclose(logprobs, own[key.version % 2, tokens], atol=TOLERANCE, rtol=0)


def answers(
    engine: VllmEngine, greedy: SampleRequest, keys: Sequence[AdapterKey]
) -> list[tuple[AdapterKey, FloatArray, tuple[int, ...]]]:
    samples = engine.sample([replace(greedy, adapter=key) for key in keys for _ in range(2)])
    return [(keys[index // 2], sample.logprobs, sample.tokens) for index, sample in enumerate(samples)]


@contextmanager
def sampling(work: Callable[[], object]) -> Iterator[list[Exception]]:
    """While the block runs, `work` is done over and over in another thread; gives the list of its errors."""
    stop = threading.Event()
    errors: list[Exception] = []

    def run() -> None:
        while not stop.is_set() and not errors:
            try:
                work()
            except Exception as error:
                errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield errors
    finally:
        stop.set()
        thread.join()
