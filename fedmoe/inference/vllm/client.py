"""A client of a vLLM server: requests as JSON, typed calls, checked answers, errors that say what to do."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx2
import numpy as np
import stamina
from pydantic import BaseModel, ValidationError

from fedmoe.inference.engine import EngineError, Sample, SampleRequest
from fedmoe.lora.adapter import FloatArray

Message = TypeVar("Message", bound=BaseModel)

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
# After 300 seconds without a token a stream is given up.
_STREAM_TIMEOUT = httpx2.Timeout(300.0, connect=10.0, pool=None)
# Answers of a server or proxy under load that a later try may not get.
_PASSING = frozenset({429, 502, 503, 504})
_NO_ROUTES = (
    "the vLLM server has no routes to load adapters; start it with the environment variable "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
)


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
    """A continuation or a part of it; `prompt_logprobs`: token ids to log-probabilities, a map for each place."""

    finish_reason: str | None = None
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


class ServerUnreachableError(EngineError):
    """No answer of a working server; the same request may succeed later."""


class ServerTimeoutError(EngineError):
    """The server took longer than it was given; it may still be at work on the request."""


class ServerRefusedError(EngineError):
    """An answer other than success, with its status: the server's own words, and what to do about them."""

    def __init__(self, answer: httpx2.Response) -> None:
        self.status = answer.status_code
        super().__init__(f"the vLLM server answered {self.status}: {_words(answer)[:600]}; {_advice(answer)}")


class VllmClient:
    """Calls one vLLM server, from any number of threads; raises EngineError, nothing else from HTTP.

    Requests that change nothing on the server are tried `attempts` times with growing pauses, others once.
    `timeout` in seconds is what one request may take, queueing included.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout: float = 600.0,
        connections: int = 256,
        attempts: int = 4,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        try:
            self._http = httpx2.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=httpx2.Timeout(timeout, connect=10.0, pool=None),
                limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
                follow_redirects=False,
                transport=transport,
            )
        except httpx2.InvalidURL as error:
            raise EngineError(f"{url!r} is no usable URL ({error}); expected one like http://127.0.0.1:8000") from error
        self._attempts = attempts
        self.url = url

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def models(self) -> dict[str, ModelCard]:
        """Everything served, base model and adapters, by name."""
        return {card.id: card for card in _parsed(self._retried("GET", "/v1/models"), ModelList).data}

    def facts(self) -> ServerFacts:
        """What the server's metrics tell about it; nothing where it has none."""
        try:
            return read_metrics(self._retried("GET", "/metrics").text)
        except ServerRefusedError:
            return ServerFacts(None, None, None)

    def check_lora_routes(self) -> None:
        """Refuse a server that cannot load adapters while it runs, with EngineError; loads nothing."""
        try:
            self._retried("POST", "/v1/load_lora_adapter", {"lora_name": "", "lora_path": ""})
        except ServerRefusedError as error:
            if error.status == 404:
                raise EngineError(_NO_ROUTES) from error
            if error.status != 400:
                raise

    def load(self, name: str, path: str) -> None:
        """Load the adapter in `path`, a folder as the server sees it, under a name that was never used before."""
        self._once("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> None:
        """Make the server forget a name; one it does not know is forgotten already."""
        try:
            self._retried("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except ServerRefusedError as error:
            if error.status != 404 or "cannot be found" not in str(error):
                raise

    def complete(self, body: Mapping[str, object]) -> CompletionChoice:
        """One continuation by the model or adapter named in `body["model"]`, which alone may have made it."""
        answer = _parsed(self._retried("POST", "/v1/completions", body), CompletionAnswer)
        if answer.model != body["model"] or len(answer.choices) != 1:
            raise EngineError(
                f"asked {body['model']} for one continuation, got {len(answer.choices)} of {answer.model}; "
                "something between here and the server answers for another model"
            )
        return answer.choices[0]

    def events(self, body: Mapping[str, object]) -> Generator[str, None, None]:
        """A streamed completion's events as they come, each the JSON text of a chunk; HTTP's errors as they are."""
        with self._http.stream("POST", "/v1/completions", json=body, timeout=_STREAM_TIMEOUT) as answer:
            if answer.status_code != 200:
                answer.read()
                raise ServerRefusedError(answer)
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield line[6:]

    def _retried(self, method: str, path: str, body: Mapping[str, object] | None = None) -> httpx2.Response:
        for attempt in stamina.retry_context(
            on=ServerUnreachableError,
            attempts=self._attempts,
            timeout=None,
            wait_initial=0.2,
            wait_max=5.0,
            wait_jitter=0.5,
        ):
            with attempt:
                return self._once(method, path, body)
        raise AssertionError("the last attempt returns or raises")

    def _once(self, method: str, path: str, body: Mapping[str, object] | None = None) -> httpx2.Response:
        try:
            answer = self._http.request(method, path, json=body)
        except (httpx2.ReadTimeout, httpx2.WriteTimeout) as error:
            raise ServerTimeoutError(f"{self.url}{path} did not answer in time; allow more, or ask for less") from error
        except httpx2.HTTPError as error:
            raise ServerUnreachableError(
                f"the vLLM server at {self.url} does not answer ({error!r}); is it running? See its log"
            ) from error
        if answer.status_code in _PASSING:
            raise ServerUnreachableError(f"{self.url}{path} answered {answer.status_code}: {_words(answer)}")
        if answer.status_code != 200:
            raise ServerRefusedError(answer)
        return answer


def _words(answer: httpx2.Response) -> str:
    """The server's error message where there is one, else the start of its body."""
    try:
        return str(json.loads(answer.text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]


def _advice(answer: httpx2.Response) -> str:
    """What to do about a refusal."""
    words = _words(answer)
    if answer.status_code in (401, 403):
        return "give the token that the server was started with (--api-key)"
    if "max_lora_rank" in words or "LoRA rank" in words:
        return "start the server with --max-lora-rank of the highest rank that any policy may get"
    if "LoRA is not enabled" in words:
        return "start the server with --enable-lora"
    if "No adapter found" in words:
        return "the server must see the adapters' folder under the same path: run it here, or share the folder"
    if "EngineCore" in words:
        return "it has died, its log says why: start it again (on a CPU with --no-enable-chunked-prefill)"
    if "does not exist" in words:
        return "the server has been restarted or another client unloaded it: load the version again under a new key"
    return "see the server's log"


def _parsed(answer: httpx2.Response, kind: type[Message]) -> Message:
    try:
        return kind.model_validate_json(answer.content)
    except ValidationError as error:
        raise EngineError(
            f"{answer.request.url} gave an answer no vLLM server gives ({error.error_count()} faults); check the URL, "
            "and that vLLM is 0.11 or newer"
        ) from error
