"""Answers of a vLLM server: whole and in the right name, or refused; and what its numbers tell about it."""

from __future__ import annotations

from pathlib import Path

import httpx2
import numpy as np
import pytest
from fake_vllm import MODEL, FakeVllm
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm_bench import Make, request

from fedmoe.inference.engine import EngineError
from fedmoe.inference.vllm.client import CompletionChoice, VllmClient, logprobs_are_processed, read_metrics
from fedmoe.inference.vllm.engine import VllmEngine


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


def top(values: dict[int, float]) -> CompletionChoice:
    shown = {f"token_id:{token}": value for token, value in values.items()}
    logprobs = {"token_logprobs": [max(values.values())], "top_logprobs": [shown]}
    return CompletionChoice.model_validate(
        {"finish_reason": "length", "token_ids": [max(values)], "logprobs": logprobs}
    )


@settings(deadline=None)
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
