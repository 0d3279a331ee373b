"""Requests to a vLLM server as JSON bodies, and its answers as checked values."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel

from fedmoe.inference.engine import EngineError, Sample, SampleRequest
from fedmoe.lora.adapter import FloatArray

# vLLM raises a lower temperature to this one without a word.
_LEAST_TEMPERATURE = 0.01
# Everything that would bend the distribution, said outright: a server's defaults come from the model's folder.
_PLAIN_SAMPLING: dict[str, object] = {
    "n": 1,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
_WRONG_MODE = "start the server with --logprobs-mode processed_logprobs"


class ModelCard(BaseModel):
    """A model or adapter being served; `root` is the path it was loaded from, `max_model_len` the context in tokens."""

    id: str
    root: str | None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    """Everything served."""

    data: list[ModelCard]


class PromptLogprob(BaseModel):
    """One token's log-probability."""

    logprob: float


class CompletionLogprobs(BaseModel):
    """Log-probabilities of generated tokens and, where asked for, of the likeliest tokens at each place."""

    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class CompletionChoice(BaseModel):
    """One continuation. `prompt_logprobs` maps, for each place of the prompt, token ids to log-probabilities."""

    finish_reason: str | None
    token_ids: list[int] | None = None
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionAnswer(BaseModel):
    """The answer to a completion request; `model` is who made it."""

    model: str
    choices: list[CompletionChoice]


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What a server's metrics say; None where they do not say it.

    `lora`: whether it takes adapters; `max_loras`: how many fit in one batch; `replicas`: data-parallel engines.
    """

    lora: bool | None
    max_loras: int | None
    replicas: int | None


def read_metrics(text: str) -> ServerFacts:
    """The facts in a Prometheus text of vLLM. `max_loras` appears there only after a first completion."""
    if "vllm:" not in text:
        return ServerFacts(None, None, None)
    slots = re.search(r'^vllm:lora_requests_info\{[^}]*\bmax_lora="(\d+)"', text, re.MULTILINE)
    engines = set(re.findall(r'^vllm:[a-z_]+\{[^}]*\bengine="(\d+)"', text, re.MULTILINE))
    return ServerFacts("vllm:lora_requests_info" in text, int(slots[1]) if slots else None, len(engines) or None)


def check_request(request: SampleRequest, processed: bool) -> None:
    """Refuse what the server would answer with other log-probabilities than the protocol's, with EngineError."""
    temperature = request.temperature
    if not request.prompt or request.max_new_tokens < 1:
        raise EngineError(
            f"a request needs a prompt and room for a token, got {len(request.prompt)} prompt tokens and "
            f"max_new_tokens {request.max_new_tokens}"
        )
    if temperature != 0.0 and not (math.isfinite(temperature) and temperature >= _LEAST_TEMPERATURE):
        raise EngineError(f"temperature must be 0 or at least {_LEAST_TEMPERATURE}, got {temperature}")
    if not processed and temperature not in (0.0, 1.0):
        raise EngineError(
            f"the server gives log-probabilities before temperature, so those at {temperature} would be wrong; "
            f"{_WRONG_MODE}"
        )


def completion_body(name: str, request: SampleRequest, stop_tokens: Sequence[int] = ()) -> dict[str, object]:
    """The completion request for one sample from the adapter or model `name`."""
    return _PLAIN_SAMPLING | {
        "model": name,
        "prompt": list(request.prompt),
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "seed": request.seed % (1 << 63),  # -1 would mean "any seed"
        "logprobs": 0,
        "stop_token_ids": list(stop_tokens),
    }


def scoring_body(name: str, prompt: Sequence[int], tokens: Sequence[int]) -> dict[str, object]:
    """The completion request that scores `tokens` as a part of the prompt; vLLM wants to add one token at least."""
    request = SampleRequest(None, (*prompt, *tokens), 1, 0.0, 0)
    return completion_body(name, request) | {"prompt_logprobs": 0}


def sample_of(choice: CompletionChoice, request: SampleRequest) -> Sample:
    """The sample in a server's answer; raises EngineError for one that is not whole."""
    tokens = tuple(choice.token_ids or ())
    logprobs = choice.logprobs.token_logprobs if choice.logprobs else []
    if not tokens or len(tokens) != len(logprobs) or len(tokens) > request.max_new_tokens:
        raise EngineError(
            f"the server gave {len(tokens)} token ids and {len(logprobs)} log-probabilities for a request of at most "
            f"{request.max_new_tokens}; vLLM 0.11 or newer is needed"
        )
    if choice.finish_reason not in ("stop", "length"):
        raise EngineError(f"the server broke a continuation off (finish_reason {choice.finish_reason!r}); see its log")
    return Sample(tokens, _checked(logprobs), choice.finish_reason == "stop")


def scores_of(choice: CompletionChoice, start: int, tokens: Sequence[int]) -> FloatArray:
    """The log-probabilities of `tokens`, which begin at place `start` of the prompt, float32 (T,)."""
    places = (choice.prompt_logprobs or [])[start:]
    if len(places) != len(tokens):
        raise EngineError(f"the server scored {len(places)} of {len(tokens)} tokens; vLLM 0.11 or newer is needed")
    scores = [(place or {}).get(str(token)) for place, token in zip(places, tokens, strict=True)]
    return _checked([None if score is None else score.logprob for score in scores])


def logprobs_are_processed(plain: CompletionChoice, flattened: CompletionChoice, temperature: float) -> bool:
    """Whether `flattened`, the same place at `temperature`, shows log-probabilities at that temperature.

    At temperature T the log-probabilities of two tokens are 1/T as far apart. Raises EngineError when the numbers are
    neither that nor unchanged, or no log-probabilities at all.
    """
    first, second = _top(plain), _top(flattened)
    shared = sorted(first.keys() & second.keys(), key=lambda token: first[token])
    if len(shared) < 2 or max(sum(math.exp(min(x, 700.0)) for x in top.values()) for top in (first, second)) > 1.001:
        raise EngineError(f"the server's answers hold no log-probabilities of the likeliest tokens; {_WRONG_MODE}")
    low, high = shared[0], shared[-1]
    apart, then = first[high] - first[low], second[high] - second[low]
    for factor, processed in ((1.0, False), (1.0 / temperature, True)):
        if apart > 0.0 and abs(then - factor * apart) <= 0.02 * apart:
            return processed
    raise EngineError(
        f"log-probabilities {apart:.4g} apart at temperature 1 are {then:.4g} apart at {temperature:g}, which is "
        f"neither before nor after temperature; {_WRONG_MODE}"
    )


def _top(choice: CompletionChoice) -> dict[str, float]:
    places = (choice.logprobs.top_logprobs if choice.logprobs else None) or [None]
    return places[0] or {}


def _checked(logprobs: Sequence[float | None]) -> FloatArray:
    values = np.array([math.nan if value is None else value for value in logprobs], np.float32)
    if not np.isfinite(values).all() or (values > 1e-3).any():
        raise EngineError(f"the server gave numbers that are no log-probabilities, among them {values.max()}")
    return np.minimum(values, np.float32(0.0))
