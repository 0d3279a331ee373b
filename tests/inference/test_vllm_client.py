"""The vLLM engine against a server in memory (E6): names, folders, batches, and what becomes of the requests."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx2
import numpy as np
import pytest
from builders import wait_until
from fake_vllm import END, FakeVllm, expected_scores, make_adapter
from vllm_bench import ONE, PROMPT, TWO, Make, folders, loads, request, served

from fedmoe.inference.engine import AdapterKey, EngineError, Sample


def test_every_version_has_a_name_and_a_folder_of_its_own(make: Make, tmp_path: Path) -> None:
    fake = FakeVllm()
    engine = make(fake)
    for version in range(3):
        engine.load(AdapterKey("poet", version), make_adapter(version))
    names = [name for name in loads(fake) if not name.startswith("zeros@")]
    assert [name.rpartition(".")[0] for name in names] == ["poet@0", "poet@1", "poet@2"]
    assert folders(tmp_path) == sorted(loads(fake))
    assert {name: Path(path).name for name, path in fake.adapters.items()} == {name: name for name in loads(fake)}
    assert not any(body.get("load_inplace") for body in fake.bodies("/v1/load_lora_adapter"))


def test_a_key_that_comes_back_is_served_with_its_new_weights(make: Make) -> None:
    engine = make(FakeVllm())
    for seed in (1, 2):
        engine.load(ONE, make_adapter(seed))
        expected = expected_scores(make_adapter(seed), PROMPT, (2, 7))
        np.testing.assert_allclose(engine.score(ONE, PROMPT, (2, 7)), expected, atol=1e-5)
        engine.unload(ONE)


def test_unloading_takes_the_folder_away(make: Make, tmp_path: Path) -> None:
    fake = FakeVllm()
    engine = make(fake)
    engine.load(ONE, make_adapter(1))
    engine.load(TWO, make_adapter(2))
    engine.unload(ONE)
    assert served(fake) == ["critic@0"]
    assert folders(tmp_path) == sorted(fake.adapters)


def test_a_folder_stays_until_the_requests_that_name_it_are_answered(make: Make, tmp_path: Path) -> None:
    fake = FakeVllm()
    engine = make(fake)
    engine.load(ONE, make_adapter(1))
    fake.hold.clear()
    fake.started.clear()
    sampled: list[int] = []
    sampling = threading.Thread(target=lambda: sampled.append(len(engine.sample([request(ONE)] * 3))))
    sampling.start()
    assert fake.started.wait(10)
    unloading = threading.Thread(target=engine.unload, args=(ONE,))
    unloading.start()
    wait_until(lambda: ONE not in engine.loaded())
    with pytest.raises(EngineError, match="not loaded: poet@0"):
        engine.sample([request(ONE)])
    assert "poet@0" in served(fake)
    assert folders(tmp_path) == sorted(fake.adapters)
    fake.hold.set()
    sampling.join(10)
    unloading.join(10)
    assert sampled == [3]
    assert served(fake) == []
    assert folders(tmp_path) == sorted(fake.adapters)


def test_a_folder_outlives_a_request_that_was_given_up(make: Make, tmp_path: Path) -> None:
    fake = FakeVllm()
    engine = make(fake)
    engine.load(ONE, make_adapter(1))
    fake.failures.append(httpx2.ReadTimeout("too long"))
    with pytest.raises(EngineError, match="did not answer in time"):
        engine.sample([request(ONE)])
    engine.unload(ONE)
    assert served(fake) == []
    assert [name for name in folders(tmp_path) if name.startswith("poet@0.")]
    engine.close()
    assert folders(tmp_path) == []


def test_an_unload_that_waits_too_long_leaves_the_version_loaded(make: Make) -> None:
    fake = FakeVllm()
    engine = make(fake, timeout=0.05)
    engine.load(ONE, make_adapter(1))
    fake.hold.clear()
    fake.started.clear()
    sampling = threading.Thread(target=engine.sample, args=([request(ONE)],))
    sampling.start()
    assert fake.started.wait(10)
    with pytest.raises(EngineError, match=r"poet@0\.\w+ is still named by 1 requests"):
        engine.unload(ONE)
    assert engine.loaded() == {ONE}
    fake.hold.set()
    sampling.join(10)
    engine.unload(ONE)


def test_all_requests_of_a_call_are_on_their_way_together(make: Make) -> None:
    fake = FakeVllm()
    engine = make(fake)
    engine.load(ONE, make_adapter(1))
    engine.load(TWO, make_adapter(2))
    fake.hold.clear()
    requests = [request(key, seed) for seed in range(8) for key in (ONE, TWO, None)]
    sampling = threading.Thread(target=engine.sample, args=(requests,))
    sampling.start()
    wait_until(lambda: fake.busiest == len(requests))
    fake.hold.set()
    sampling.join(10)
    assert fake.busiest == len(requests)
    models = [str(body["model"]).rpartition(".")[0] for body in fake.bodies("/v1/completions")[-24:]]
    assert {model: models.count(model) for model in models} == {"poet@0": 8, "critic@0": 8, "zeros@0": 8}


def test_the_base_model_beside_adapters_is_never_computed_with_what_lies_in_a_slot(make: Make) -> None:
    fake = FakeVllm(max_loras=3)
    engine = make(fake)
    for seed in range(5):
        engine.load(ONE, make_adapter(seed))
        engine.unload(ONE)
    engine.load(ONE, make_adapter(1))
    fake.hold.clear()
    samples: list[Sample] = []
    sampling = threading.Thread(target=lambda: samples.extend(engine.sample([request(ONE), request(None)])))
    sampling.start()
    wait_until(lambda: fake.busiest == 2)
    fake.hold.set()
    sampling.join(10)
    for sample, weights in zip(samples, (make_adapter(1), None), strict=True):
        np.testing.assert_allclose(sample.logprobs, expected_scores(weights, PROMPT, sample.tokens), atol=1e-5)


def test_the_first_load_waits_for_requests_that_name_the_base_model_itself(make: Make) -> None:
    fake = FakeVllm()
    engine = make(fake)
    fake.hold.clear()
    sampling = threading.Thread(target=engine.sample, args=([request(None)],))
    loading = threading.Thread(target=engine.load, args=(ONE, make_adapter(1)))
    fake.started.clear()
    sampling.start()
    assert fake.started.wait(10)
    loading.start()
    wait_until(lambda: bool(loads(fake)))
    time.sleep(0.05)
    assert engine.loaded() == frozenset()
    fake.hold.set()
    sampling.join(10)
    loading.join(10)
    assert engine.loaded() == {ONE}


def test_the_distribution_is_asked_for_outright(make: Make) -> None:
    fake = FakeVllm()
    make(fake).sample([request(None, seed=-1, temperature=0.7)])
    body = fake.bodies("/v1/completions")[-1]
    assert body["seed"] == (1 << 63) - 1  # -1 is vLLM's word for "any seed"
    plain = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "temperature": 0.7}
    assert {name: body[name] for name in plain} == plain


def test_a_continuation_ends_with_its_end_token(make: Make) -> None:
    samples = make(FakeVllm()).sample([request(None, seed, tokens=100) for seed in range(8)])
    assert any(sample.stopped for sample in samples)
    for sample in samples:
        assert sample.stopped == (sample.tokens[-1] == END)
        np.testing.assert_allclose(sample.logprobs, expected_scores(None, PROMPT, sample.tokens), atol=1e-5)


def test_answers_of_a_busy_server_are_asked_for_again(make: Make) -> None:
    fake = FakeVllm()
    engine = make(fake)
    expected = engine.sample([request(None)])[0].tokens
    for failure in (503, httpx2.ConnectError("refused"), httpx2.RemoteProtocolError("closed")):
        fake.failures.append(failure)
        assert engine.sample([request(None)])[0].tokens == expected


def test_one_failure_fails_the_call_and_nothing_stays_named(make: Make, tmp_path: Path) -> None:
    fake = FakeVllm()
    engine = make(fake, concurrency=2)  # so that most requests are never sent
    engine.load(ONE, make_adapter(1))
    fake.failures.append(500)
    with pytest.raises(EngineError, match="answered 500: the server is overloaded or broken; see the server's log"):
        engine.sample([request(ONE, seed) for seed in range(6)])
    engine.unload(ONE)
    assert folders(tmp_path) == sorted(fake.adapters)
