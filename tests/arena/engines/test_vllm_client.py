"""The vLLM engine against a server in memory: names, folders, batches, and every refusal with what to do about it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx2
import numpy as np
import pytest
from fake_vllm import END, LIMIT, MODEL, FakeVllm, expected_scores, make_adapter
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.arena.engines.protocol import AdapterKey, EngineError, Sample, SampleRequest
from fedmoe.arena.engines.vllm_engine import VllmEngine
from fedmoe.arena.engines.vllm_http import VllmClient
from fedmoe.arena.engines.vllm_messages import Choice, logprobs_are_processed, read_metrics

ONE, TWO = AdapterKey("poet", 0), AdapterKey("critic", 0)
PROMPT = (3, 1, 4, 1, 5)
Make = Callable[..., VllmEngine]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Engines on a fake server, closed at the end."""
    made: list[VllmEngine] = []

    def engine(
        fake: FakeVllm,
        folder: str = "adapters",
        token: str | None = None,
        timeout: float = 10.0,
        concurrency: int = 64,
    ) -> VllmEngine:
        made.append(
            VllmEngine(
                "http://fake",
                MODEL,
                tmp_path / folder,
                token=token,
                timeout=timeout,
                concurrency=concurrency,
                transport=fake.transport,
                attempts=2,
            )
        )
        return made[-1]

    yield engine
    for one in made:
        one.close()


def request(key: AdapterKey | None, seed: int = 0, temperature: float = 1.0, tokens: int = 8) -> SampleRequest:
    return SampleRequest(key, PROMPT, tokens, temperature, seed)


def folders(tmp_path: Path, folder: str = "adapters") -> list[str]:
    return sorted(path.name for path in (tmp_path / folder).iterdir() if path.is_dir())


def loads(fake: FakeVllm) -> list[str]:
    """Every name that was loaded, in order."""
    return [str(body["lora_name"]) for body in fake.bodies("/v1/load_lora_adapter") if body["lora_name"]]


def served(fake: FakeVllm) -> list[str]:
    """The keys of the policies' versions on the server."""
    return [name.rpartition(".")[0] for name in fake.adapters if not name.startswith("zeros@")]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)


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


def test_a_server_that_does_not_answer_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"vLLM server at http://127\.0\.0\.1:9 does not answer"):
        VllmEngine("http://127.0.0.1:9", MODEL, tmp_path, attempts=1)


UNFIT: dict[str, tuple[FakeVllm, str]] = {
    "no routes": (FakeVllm(routes=False), "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
    "no adapters": (FakeVllm(lora=False), "start it with --enable-lora"),
    "replicas": (FakeVllm(replicas=2), "2 data-parallel replicas .* without --data-parallel-size"),
    "raw logits": (FakeVllm(logprobs_mode="raw_logits"), "--logprobs-mode processed_logprobs"),
    "processed logits": (FakeVllm(logprobs_mode="processed_logits"), "--logprobs-mode processed_logprobs"),
    "token": (FakeVllm(token="secret"), "answered 401.*give the token that the server was started with"),
}


@pytest.mark.parametrize("case", sorted(UNFIT))
def test_a_server_that_cannot_do_the_work_is_refused_with_advice(make: Make, case: str) -> None:
    fake, advice = UNFIT[case]
    with pytest.raises(EngineError, match=advice):
        make(fake)


def test_a_refused_engine_lets_its_folder_go(make: Make) -> None:
    with pytest.raises(EngineError, match="--enable-lora"):
        make(FakeVllm(lora=False))
    assert make(FakeVllm()).loaded() == frozenset()


def test_a_model_that_is_not_served_is_refused_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"no model 'other'; it serves base"):
        VllmEngine("http://fake", "other", tmp_path, transport=FakeVllm().transport)


def test_a_token_is_sent_along(make: Make) -> None:
    engine = make(FakeVllm(token="secret"), token="secret")
    engine.load(ONE, make_adapter(1))
    assert engine.loaded() == {ONE}


def test_two_engines_never_share_a_folder(make: Make) -> None:
    fake = FakeVllm()
    make(fake)
    with pytest.raises(EngineError, match="give every engine an adapters folder of its own"):
        make(fake)


def test_what_a_killed_engine_left_is_cleared_and_nothing_else(make: Make, tmp_path: Path) -> None:
    fake = FakeVllm()
    ours, theirs = tmp_path / "adapters" / "poet@3.0123abcd", tmp_path / "elsewhere" / "poet@3.0123abcd"
    kept = tmp_path / "adapters" / "results"
    for folder in (ours, theirs, kept):
        folder.mkdir(parents=True)
    fake.adapters = {"poet@3.0123abcd": str(ours), "poet@3.4567abcd": str(theirs), "sql": str(kept)}
    make(fake)
    assert sorted(fake.adapters) == ["poet@3.4567abcd", "sql"]
    assert not ours.exists()
    assert theirs.exists()
    assert kept.exists()


def test_a_rank_above_the_servers_is_refused_and_leaves_nothing(make: Make, tmp_path: Path) -> None:
    fake = FakeVllm(max_rank=4)
    engine = make(fake)
    with pytest.raises(EngineError, match=r"rank 5 is greater than max_lora_rank 4.*--max-lora-rank"):
        engine.load(ONE, make_adapter(1, rank=5))
    assert engine.loaded() == frozenset()
    assert served(fake) == []
    assert folders(tmp_path) == sorted(fake.adapters)


def test_more_adapters_than_a_batch_holds_are_refused(make: Make) -> None:
    engine = make(FakeVllm(max_loras=3))
    engine.load(ONE, make_adapter(1))
    engine.load(TWO, make_adapter(2))
    with pytest.raises(EngineError, match=r"at most 3 adapters, one of them for the base model, and holds 2.*--max-"):
        engine.load(AdapterKey("judge", 0), make_adapter(3))
    engine.unload(ONE)
    engine.load(AdapterKey("judge", 0), make_adapter(3))


def test_a_server_that_does_not_see_the_folder_is_told_apart(tmp_path: Path) -> None:
    client = VllmClient("http://fake", transport=FakeVllm().transport)
    with pytest.raises(EngineError, match="under the same path: run it here, or share the folder"):
        client.load("poet@0", str(tmp_path / "nowhere"))


def test_an_adapter_the_server_has_lost_is_an_error_not_the_base_model(make: Make) -> None:
    fake = FakeVllm()
    engine = make(fake)
    engine.load(ONE, make_adapter(1))
    fake.adapters.clear()
    with pytest.raises(EngineError, match=r"does not exist.*load the version again under a new key"):
        engine.sample([request(ONE)])
    engine.unload(ONE)  # gone is what it was to be
    assert engine.loaded() == frozenset()


def test_a_server_that_ignores_temperature_serves_only_what_is_exact(make: Make) -> None:
    engine = make(FakeVllm(logprobs_mode="raw_logprobs"))
    for temperature in (0.0, 1.0):
        (sample,) = engine.sample([request(None, temperature=temperature)])
        np.testing.assert_allclose(sample.logprobs, expected_scores(None, PROMPT, sample.tokens), atol=1e-5)
    with pytest.raises(EngineError, match="--logprobs-mode processed_logprobs"):
        engine.sample([request(None, temperature=0.7)])


@pytest.mark.parametrize("temperature", [-1.0, 0.001, float("nan"), float("inf")])
def test_a_temperature_the_server_would_bend_is_refused(make: Make, temperature: float) -> None:
    with pytest.raises(EngineError, match="temperature must be 0 or at least"):
        make(FakeVllm()).sample([request(None, temperature=temperature)])


def test_requests_without_prompt_or_room_are_refused(make: Make) -> None:
    engine = make(FakeVllm())
    with pytest.raises(EngineError, match="needs a prompt"):
        engine.sample([replace(request(None), prompt=())])
    with pytest.raises(EngineError, match="max_new_tokens 0"):
        engine.sample([request(None, tokens=0)])
    with pytest.raises(EngineError, match="needs a prompt"):
        engine.score(None, (), (1,))
    with pytest.raises(EngineError, match=f"maximum context length is {LIMIT}"):
        engine.sample([request(None, tokens=LIMIT)])


@pytest.mark.parametrize("name", ["../poet", "po/et", "", ".poet", "poet@1"])
def test_a_name_that_is_no_folder_name_is_refused(make: Make, name: str) -> None:
    with pytest.raises(EngineError, match="cannot name an adapter"):
        make(FakeVllm()).load(AdapterKey(name, 0), make_adapter(1))


def test_an_answer_in_another_models_name_is_refused() -> None:
    def answer(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json={"model": "other", "choices": [{"finish_reason": "stop"}]})

    client = VllmClient("http://fake", transport=httpx2.MockTransport(answer))
    with pytest.raises(EngineError, match="asked poet for one continuation, got 1 of other"):
        client.complete({"model": "poet"})


@pytest.mark.parametrize(
    "choice",
    [
        {"finish_reason": "length", "token_ids": None, "logprobs": {"token_logprobs": [-1.0]}},
        {"finish_reason": "length", "token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0]}},
        {"finish_reason": "length", "token_ids": [1, 2, 3], "logprobs": {"token_logprobs": [-1.0, -1.0, -1.0]}},
        {"finish_reason": "length", "token_ids": [1], "logprobs": None},
        {"finish_reason": "length", "token_ids": [1], "logprobs": {"token_logprobs": [None]}},
        {"finish_reason": "length", "token_ids": [1], "logprobs": {"token_logprobs": [0.5]}},
        {"finish_reason": "abort", "token_ids": [1], "logprobs": {"token_logprobs": [-1.0]}},
    ],
)
def test_a_sample_that_is_not_whole_is_refused(make: Make, choice: dict[str, object]) -> None:
    fake = FakeVllm()
    engine = make(fake)
    fake._choice = lambda body, prompt, weights: choice  # type: ignore[method-assign]
    with pytest.raises(EngineError):
        engine.sample([request(None, tokens=2)])


def test_a_page_that_is_no_vllm_server_is_told_apart(tmp_path: Path) -> None:
    page = httpx2.MockTransport(lambda _: httpx2.Response(200, text="<html>hello</html>"))
    with pytest.raises(EngineError, match=r"gave an answer no vLLM server gives"):
        VllmEngine("http://fake", MODEL, tmp_path, transport=page)


def test_metrics_tell_slots_and_replicas_or_nothing() -> None:
    text = (
        'vllm:num_requests_running{engine="0",model_name="m"} 0.0\n'
        'vllm:lora_requests_info{max_lora="6",running_lora_adapters="a,b"} 1.7e+09\n'
    )
    assert (read_metrics(text).lora, read_metrics(text).max_loras, read_metrics(text).replicas) == (True, 6, 1)
    assert read_metrics("python_info 1.0\n").lora is None


def top(values: dict[int, float]) -> Choice:
    shown = {f"token_id:{token}": value for token, value in values.items()}
    logprobs = {"token_logprobs": [max(values.values())], "top_logprobs": [shown]}
    return Choice.model_validate({"finish_reason": "length", "token_ids": [max(values)], "logprobs": logprobs})


@given(
    logits=st.lists(st.floats(-8, 8), min_size=3, max_size=8).filter(lambda xs: max(xs) - min(xs) > 0.1),
    temperature=st.floats(1.2, 5.0),
)
def test_the_probe_tells_processed_from_raw_log_probabilities(logits: list[float], temperature: float) -> None:
    values = np.array(logits)

    def logprobs(at: float) -> dict[int, float]:
        scaled = values / at
        return dict(enumerate((scaled - np.log(np.exp(scaled).sum())).tolist()))

    assert logprobs_are_processed(top(logprobs(1.0)), top(logprobs(temperature)), temperature)
    assert not logprobs_are_processed(top(logprobs(1.0)), top(logprobs(1.0)), temperature)
    doubled = {token: value * 3 - 9 for token, value in logprobs(1.0).items()}
    with pytest.raises(EngineError, match="neither before nor after temperature"):
        logprobs_are_processed(top(logprobs(1.0)), top(doubled), temperature)
