"""A client of a vLLM server: typed calls, checked answers, errors that say what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import httpx2
import stamina
from pydantic import BaseModel, ValidationError

from fedmoe.inference.engine import EngineError
from fedmoe.inference.vllm.messages import (
    CompletionAnswer,
    CompletionChoice,
    ModelCard,
    ModelList,
    ServerFacts,
    read_metrics,
)

Message = TypeVar("Message", bound=BaseModel)

# Answers of a server or proxy under load that a later try may not get.
_PASSING = frozenset({429, 502, 503, 504})
_NO_ROUTES = (
    "the vLLM server has no routes to load adapters; start it with the environment variable "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
)


class ServerUnreachableError(EngineError):
    """No answer of a working server; the same request may succeed later."""


class ServerTimeoutError(EngineError):
    """The server took longer than it was given; it may still be at work on the request."""


class ServerRefusedError(EngineError):
    """An answer other than success, with its status and the server's own words."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


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

    def models(self) -> dict[str, str]:
        """Everything served, base model and adapters: name -> path it was loaded from."""
        return {card.id: card.root or "" for card in self._cards()}

    def context(self, model: str) -> int | None:
        """The most tokens of prompt and answer together that the server takes, if it says so."""
        return next((card.max_model_len for card in self._cards() if card.id == model), None)

    def _cards(self) -> list[ModelCard]:
        with _explaining():
            answer = self._retried("GET", "/v1/models")
        return _parsed(answer, ModelList).data

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
                raise EngineError(_advised(error)) from error

    def load(self, name: str, path: str) -> None:
        """Load the adapter in `path`, a folder as the server sees it, under a name that was never used before."""
        with _explaining():
            self._once("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload(self, name: str) -> None:
        """Make the server forget a name; one it does not know is forgotten already."""
        try:
            self._retried("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except ServerRefusedError as error:
            if error.status != 404 or "cannot be found" not in str(error):
                raise EngineError(_advised(error)) from error

    def complete(self, body: Mapping[str, object]) -> CompletionChoice:
        """One continuation by the model or adapter named in `body["model"]`, which alone may have made it."""
        with _explaining():
            answer = _parsed(self._retried("POST", "/v1/completions", body), CompletionAnswer)
        if answer.model != body["model"] or len(answer.choices) != 1:
            raise EngineError(
                f"asked {body['model']} for one continuation, got {len(answer.choices)} of {answer.model}; "
                "something between here and the server answers for another model"
            )
        return answer.choices[0]

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
            raise ServerRefusedError(_words(answer), answer.status_code)
        return answer


def _words(answer: httpx2.Response) -> str:
    """The server's error message where there is one, else the start of its body."""
    try:
        return str(json.loads(answer.text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]


@contextmanager
def _explaining() -> Iterator[None]:
    try:
        yield
    except ServerRefusedError as error:
        raise EngineError(_advised(error)) from error


def _advised(error: ServerRefusedError) -> str:
    """The server's refusal in its own words, and what to do about it."""
    words = str(error)
    if error.status in (401, 403):
        advice = "give the token that the server was started with (--api-key)"
    elif "max_lora_rank" in words or "LoRA rank" in words:
        advice = "start the server with --max-lora-rank of the highest rank that any policy may get"
    elif "LoRA is not enabled" in words:
        advice = "start the server with --enable-lora"
    elif "No adapter found" in words:
        advice = "the server must see the adapters' folder under the same path: run it here, or share the folder"
    elif "EngineCore" in words:
        advice = "it has died, its log says why: start it again (on a CPU with --no-enable-chunked-prefill)"
    elif "does not exist" in words:
        advice = "the server has been restarted or another client unloaded it: load the version again under a new key"
    else:
        advice = "see the server's log"
    return f"the vLLM server answered {error.status}: {words[:600]}; {advice}"


def _parsed(answer: httpx2.Response, kind: type[Message]) -> Message:
    try:
        return kind.model_validate_json(answer.content)
    except ValidationError as error:
        raise EngineError(
            f"{answer.request.url} gave an answer no vLLM server gives ({error.error_count()} faults); check the URL, "
            "and that vLLM is 0.11 or newer"
        ) from error
