"""The backend on a vLLM server: verified before it is served, and never an answer of another model."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fake_vllm import MODEL, expected_scores, make_adapter
from streaming_vllm import StreamingFakeVllm
from test_serve_conformance import fake_backend

from fedmoe.arena.engines.protocol import EngineError
from fedmoe.arena.engines.verify import Probe
from fedmoe.arena.engines.vllm_engine import VllmEngine
from fedmoe.gateway.serve.protocol import BackendError, Generation, Sampling, ServedModel, Step
from fedmoe.gateway.serve.vllm_backend import VllmBackend

PROBES = (Probe((3, 1, 4), (1, 5, 9)), Probe((2, 7), (1, 8, 2)))
PYTHON = ServedModel("python", 1, "a" * 64)


def steps(backend: VllmBackend, wanted: Generation) -> list[Step]:
    async def run() -> list[Step]:
        return [step async for step in backend.generate(wanted)]

    return asyncio.run(run())


def generation(model: ServedModel | None = PYTHON, **sampling: float | int | None) -> Generation:
    return Generation(model, (3, 1, 4), Sampling(**{"max_new_tokens": 6, **sampling}))  # type: ignore[arg-type]


def test_every_version_has_a_name_of_its_own_and_leaves_no_trace(tmp_path: Path) -> None:
    fake = StreamingFakeVllm()
    backend = fake_backend(fake, tmp_path, PROBES)
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

    def mistaken(adapter: object, probes: object) -> list[object]:
        return [expected_scores(None if adapter is None else make_adapter(99), p.prompt, p.tokens) for p in PROBES]

    backend = VllmBackend("http://fake", engine, mistaken, PROBES, transport=fake.transport)  # type: ignore[arg-type]
    with pytest.raises(BackendError, match=r"python@1.* nats off"):
        backend.load(PYTHON, make_adapter(1))
    assert backend.loaded() == frozenset()
    assert not [name for name in fake.adapters if name.startswith("python")]
    backend.close()


def test_a_server_of_another_base_model_is_refused_at_the_start(tmp_path: Path) -> None:
    fake = StreamingFakeVllm()
    engine = VllmEngine("http://fake", MODEL, tmp_path, transport=fake.transport)

    def other(adapter: object, probes: object) -> list[object]:
        return [expected_scores(make_adapter(99), p.prompt, p.tokens) for p in PROBES]

    with pytest.raises(EngineError, match="another model"):
        VllmBackend("http://fake", engine, other, PROBES, transport=fake.transport)  # type: ignore[arg-type]


def test_an_answer_of_another_model_is_an_error(tmp_path: Path) -> None:
    fake = StreamingFakeVllm(say="somebody")
    backend = fake_backend(fake, tmp_path, PROBES)
    backend.load(PYTHON, make_adapter(1))
    with pytest.raises(BackendError, match="got an answer of somebody"):
        steps(backend, generation())
    backend.close()


def test_a_stream_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    fake = StreamingFakeVllm(cut=1)
    backend = fake_backend(fake, tmp_path, PROBES)
    backend.load(PYTHON, make_adapter(1))
    with pytest.raises(BackendError, match="ended before its text did"):
        steps(backend, generation())
    backend.close()


def test_what_the_server_says_is_wrong_is_told(tmp_path: Path) -> None:
    backend = fake_backend(StreamingFakeVllm(), tmp_path, PROBES)
    backend.load(PYTHON, make_adapter(1))
    with pytest.raises(BackendError, match="maximum context length"):
        steps(backend, generation(max_new_tokens=1000))
    backend.close()


def test_log_probabilities_after_temperature_are_not_passed_off_as_the_models_own(tmp_path: Path) -> None:
    backend = fake_backend(StreamingFakeVllm(), tmp_path, PROBES)
    backend.load(PYTHON, make_adapter(1))
    with pytest.raises(BackendError, match="raw_logprobs"):
        steps(backend, generation(temperature=0.5, alternatives=1))
    assert steps(backend, generation(temperature=1.0, alternatives=1))[0].likelihood is not None
    assert steps(backend, generation(temperature=0.5))[0].likelihood is None
    backend.close()


def test_the_base_model_is_never_asked_by_its_name_beside_adapters(tmp_path: Path) -> None:
    fake = StreamingFakeVllm()
    backend = fake_backend(fake, tmp_path, PROBES)
    backend.load(PYTHON, make_adapter(1))
    steps(backend, generation(None))
    asked = [str(body["model"]) for body in fake.bodies("/v1/completions") if body.get("stream")]
    assert [name.partition("@")[0] for name in asked] == ["zeros"]
    backend.close()
