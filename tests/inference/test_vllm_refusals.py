"""What the vLLM engine refuses, servers and requests alike, and that it says what to do about it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_vllm import LIMIT, MODEL, FakeVllm, expected_scores, make_adapter
from vllm_bench import ONE, PROMPT, TWO, Make, folders, request, served

from fedmoe.inference.engine import AdapterKey, EngineError, context_limit
from fedmoe.inference.vllm.client import VllmClient
from fedmoe.inference.vllm.engine import VllmEngine


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


def test_the_servers_context_is_known_so_that_longer_prompts_are_never_sent(make: Make) -> None:
    assert context_limit(make(FakeVllm())) == LIMIT


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
