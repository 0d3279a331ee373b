"""The backend on a vLLM server: verified before it is served, and never an answer of another model."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest
from fake_vllm import MODEL, expected_scores, make_adapter
from streaming_vllm import PROMPTS, StreamingFakeVllm, fake_backend

from fedmoe.inference.backend import BackendError, ContinuationRequest, DecodingStep, SamplingOptions, ServedModel
from fedmoe.inference.engine import EngineError
from fedmoe.inference.verify import Probe
from fedmoe.inference.vllm.backend import VllmBackend
from fedmoe.inference.vllm.engine import VllmEngine
from fedmoe.lora.adapter import Adapter, FloatArray, ShapeError

PYTHON = ServedModel("python", 1, "a" * 64)


def steps(backend: VllmBackend, wanted: ContinuationRequest) -> list[DecodingStep]:
    async def run() -> list[DecodingStep]:
        return [step async for step in backend.generate(wanted)]

    return asyncio.run(run())


def generation(model: ServedModel | None = PYTHON, **sampling: float | int | None) -> ContinuationRequest:
    return ContinuationRequest(model, (3, 1, 4), SamplingOptions(**{"max_new_tokens": 6, **sampling}))  # type: ignore[arg-type]


def test_every_version_has_a_name_of_its_own_and_leaves_no_trace(tmp_path: Path) -> None:
    fake = StreamingFakeVllm()
    backend = fake_backend(fake, tmp_path)
    for version in range(4):
        backend.load(ServedModel("python", version, "a" * 64), make_adapter(version))
        if version:
            backend.unload(ServedModel("python", version - 1, "a" * 64))
    names = [str(body["lora_name"]) for body in fake.bodies("/v1/load_lora_adapter") if body["lora_name"]]
    assert len(names) == len(set(names)) == 5  # and the base model as zeros
    backend.close()
    assert fake.adapters == {}
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_weights_that_do_not_compute_as_ours_are_not_served(tmp_path: Path) -> None:
    fake = StreamingFakeVllm()
    engine = VllmEngine("http://fake", MODEL, tmp_path, transport=fake.transport)

    def mistaken(adapter: Adapter | None, probes: Sequence[Probe]) -> list[FloatArray]:
        return [expected_scores(None if adapter is None else make_adapter(99), p.prompt, p.tokens) for p in probes]

    backend = VllmBackend(engine, mistaken, PROMPTS)
    with pytest.raises(BackendError, match=r"python@1.* nats off"):
        backend.load(PYTHON, make_adapter(1))
    assert backend.loaded() == frozenset()
    assert not [name for name in fake.adapters if name.startswith("python")]
    backend.close()


def test_a_version_that_our_own_model_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    fake = StreamingFakeVllm()
    engine = VllmEngine("http://fake", MODEL, tmp_path, transport=fake.transport)

    def narrow(adapter: Adapter | None, probes: Sequence[Probe]) -> list[FloatArray]:
        if adapter is not None:
            raise ShapeError("the adapter has numbers that are not finite in torch.float16")
        return [expected_scores(None, probe.prompt, probe.tokens) for probe in probes]

    backend = VllmBackend(engine, narrow, PROMPTS)
    with pytest.raises(BackendError, match=r"python@1.* not finite in torch.float16"):
        backend.load(PYTHON, make_adapter(1))
    assert backend.loaded() == frozenset()
    assert not [name for name in fake.adapters if name.startswith("python")]
    backend.close()


def test_a_version_arrives_while_an_answer_takes_its_time(tmp_path: Path) -> None:
    fake = StreamingFakeVllm()
    backend = fake_backend(fake, tmp_path)
    backend.load(PYTHON, make_adapter(1))
    fake.flowing.clear()
    newer = ServedModel("python", 2, "b" * 64)
    with ThreadPoolExecutor(2) as pool:
        answer = pool.submit(steps, backend, generation())
        try:
            while backend.busy() != (1, 0):
                time.sleep(0.001)
            pool.submit(backend.load, newer, make_adapter(2)).result(10)
            assert backend.busy() == (1, 0)
        finally:
            fake.flowing.set()
        assert answer.result(10)[-1].finish is not None
    assert backend.loaded() == {PYTHON, newer}
    backend.close()


class StaleVllm(StreamingFakeVllm):
    """Computes every adapter with the weights of the first that is not the zeros."""

    def _load(self, name: str, path: str) -> httpx2.Response:
        answer = super()._load(name, path)
        known = [weights for (other, _), weights in self._cache.items() if not other.startswith("zeros@")]
        if known:
            self._cache[name, path] = known[0]
        return answer


def test_a_server_that_stays_with_the_version_before_is_refused_even_within_the_tolerance(tmp_path: Path) -> None:
    backend = fake_backend(StaleVllm(), tmp_path)
    first = make_adapter(1)
    backend.load(PYTHON, first)
    newer = Adapter(first.layout, first.alpha, first.flat * np.float32(1.02))
    with pytest.raises(BackendError, match="still serves the old one"):
        backend.load(ServedModel("python", 2, "b" * 64), newer)
    assert backend.loaded() == {PYTHON}
    backend.load(ServedModel("python", 3, "c" * 64), first)  # the same weights may look the same
    backend.close()


def test_a_small_step_is_served(tmp_path: Path) -> None:
    backend = fake_backend(StreamingFakeVllm(), tmp_path)
    first = make_adapter(1)
    for version in range(1, 4):
        step = Adapter(first.layout, first.alpha, first.flat * np.float32(1.0 + 0.02 * version))
        backend.load(ServedModel("python", version, "a" * 64), step)
    assert len(backend.loaded()) == 3
    backend.close()


def test_a_server_of_another_base_model_is_refused_at_the_start(tmp_path: Path) -> None:
    fake = StreamingFakeVllm()
    engine = VllmEngine("http://fake", MODEL, tmp_path, transport=fake.transport)

    def other(adapter: Adapter | None, probes: Sequence[Probe]) -> list[FloatArray]:
        return [expected_scores(make_adapter(99), p.prompt, p.tokens) for p in probes]

    with pytest.raises(EngineError, match="another model"):
        VllmBackend(engine, other, PROMPTS)


def test_an_answer_of_another_model_is_an_error(tmp_path: Path) -> None:
    fake = StreamingFakeVllm(say="somebody")
    backend = fake_backend(fake, tmp_path)
    backend.load(PYTHON, make_adapter(1))
    with pytest.raises(BackendError, match="got an answer of somebody"):
        steps(backend, generation())
    backend.close()


def test_a_stream_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    fake = StreamingFakeVllm(cut=1)
    backend = fake_backend(fake, tmp_path)
    backend.load(PYTHON, make_adapter(1))
    with pytest.raises(BackendError, match="ended before its text did"):
        steps(backend, generation())
    backend.close()


def test_what_the_server_says_is_wrong_is_told(tmp_path: Path) -> None:
    backend = fake_backend(StreamingFakeVllm(), tmp_path)
    backend.load(PYTHON, make_adapter(1))
    with pytest.raises(BackendError, match="maximum context length"):
        steps(backend, generation(max_new_tokens=1000))
    backend.close()


def test_log_probabilities_after_temperature_are_not_passed_off_as_the_models_own(tmp_path: Path) -> None:
    backend = fake_backend(StreamingFakeVllm(), tmp_path)
    backend.load(PYTHON, make_adapter(1))
    with pytest.raises(BackendError, match="raw_logprobs"):
        steps(backend, generation(temperature=0.5, alternatives=1))
    assert steps(backend, generation(temperature=1.0, alternatives=1))[0].likelihood is not None
    assert steps(backend, generation(temperature=0.5))[0].likelihood is None
    backend.close()


def test_the_base_model_is_never_asked_by_its_name_beside_adapters(tmp_path: Path) -> None:
    fake = StreamingFakeVllm()
    backend = fake_backend(fake, tmp_path)
    backend.load(PYTHON, make_adapter(1))
    steps(backend, generation(None))
    asked = [str(body["model"]) for body in fake.bodies("/v1/completions") if body.get("stream")]
    assert [name.partition("@")[0] for name in asked] == ["zeros"]
    backend.close()
