"""A gateway server's backend on vLLM: every version is an adapter of its own there, verified before it is served.

`VllmEngine` knows the server's traps (a new name and folder for every version, the base model as an adapter of zeros);
here are the token streams. A thread reads each of them: as many as may run at once, the others wait here.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import count
from typing import Literal

import httpx2
import numpy as np
from pydantic import BaseModel, ValidationError

from fedmoe.inference.backend import (
    BackendError,
    ContinuationRequest,
    DecodingStep,
    Likelihood,
    SamplingOptions,
    ServedModel,
)
from fedmoe.inference.engine import AdapterKey, EngineError, SampleRequest
from fedmoe.inference.verify import Probe
from fedmoe.inference.vllm.check import Reference, VersionCheck
from fedmoe.inference.vllm.engine import ServedAdapter, VllmEngine
from fedmoe.inference.vllm.messages import CompletionLogprobs, completion_body
from fedmoe.lora.adapter import Adapter, FloatArray, ShapeError

# Seconds without a token after which a stream is given up.
_LONGEST_SILENCE = 300.0


class _ChoiceDelta(BaseModel):
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: CompletionLogprobs | None = None


class _CompletionChunk(BaseModel):
    model: str
    choices: list[_ChoiceDelta]


class VllmBackend:
    """A `Backend` over one vLLM server, which `engine` watches; at most `rows` generations are under way there.

    What every version says to `prompts` is verified by log-probabilities before `load` returns, the base model's at the
    start.
    """

    def __init__(
        self,
        url: str,
        engine: VllmEngine,
        reference: Reference,
        prompts: Sequence[tuple[int, ...]],
        token: str | None = None,
        rows: int = 64,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._engine = engine
        self._reference = reference
        self._reference_lock = threading.Lock()
        self._check = VersionCheck(engine, self._own_scores, prompts)
        self._serials = count()
        self._lock = threading.Lock()
        self._keys: dict[ServedModel, AdapterKey] = {}
        self._adapters: dict[ServedModel, Adapter] = {}
        self._running = self._submitted = 0
        self._http = httpx2.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx2.Timeout(_LONGEST_SILENCE, connect=10.0, pool=None),
            limits=httpx2.Limits(max_connections=rows, max_keepalive_connections=rows),
            transport=transport,
        )
        self._pool = ThreadPoolExecutor(rows, thread_name_prefix="vllm-stream")
        try:
            self._check.base()
        except BaseException:
            self.close()
            raise

    def load(self, model: ServedModel, adapter: Adapter) -> None:
        """Make a version available once it computes what our own model computes."""
        with self._lock:
            if model in self._keys:
                raise BackendError(f"{model} is loaded already; a version is loaded once and never changes")
        # Keys of the engine are never used twice; versions of a coordinator that starts anew are.
        key = AdapterKey(model.name, next(self._serials))
        try:
            self._engine.load(key, adapter)
            try:
                self._check.version(key, adapter)
            except BaseException:
                self._engine.unload(key)
                raise
        except (EngineError, ShapeError) as error:  # the latter: numbers that our own model's precision cannot hold
            raise BackendError(f"{model} cannot be served: {error}") from error
        with self._lock:
            self._keys[model], self._adapters[model] = key, adapter

    def unload(self, model: ServedModel) -> None:
        """Let a version go once no stream names it."""
        with self._lock:
            key = self._keys.pop(model, None)
            self._adapters.pop(model, None)
        if key is None:
            raise BackendError(f"{model} is not loaded")
        try:
            self._engine.unload(key)
        except EngineError as error:
            raise BackendError(f"{model} stays on the server: {error}") from error

    def loaded(self) -> frozenset[ServedModel]:
        """The versions that can be generated with."""
        with self._lock:
            return frozenset(self._keys)

    def log_likelihoods(self, text: Sequence[int], models: Sequence[ServedModel]) -> list[float]:
        """By our own model: the server would hold up all streams to score a prompt."""
        if len(text) == 1:
            return [0.0] * len(models)
        with self._lock:
            missing = [str(model) for model in models if model not in self._adapters]
            adapters = [self._adapters[model] for model in models if model in self._adapters]
        if missing:
            raise BackendError(f"{', '.join(missing)} not loaded")
        probe = Probe(tuple(text[:1]), tuple(text[1:]))
        return [float(self._own_scores(adapter, [probe])[0].sum(dtype=np.float64)) for adapter in adapters]

    def busy(self) -> tuple[int, int]:
        """How many streams are under way, and how many wait for a thread."""
        return self._running, max(0, self._submitted - self._running)

    async def generate(self, wanted: ContinuationRequest) -> AsyncGenerator[DecodingStep, None]:
        """The tokens as they come."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[DecodingStep | BackendError] = asyncio.Queue()
        stop = threading.Event()

        def send(item: DecodingStep | BackendError) -> None:
            with suppress(RuntimeError):  # a loop that is closed has no listeners left
                loop.call_soon_threadsafe(queue.put_nowait, item)

        self._submit(wanted, send, stop)
        try:
            while True:
                item = await queue.get()
                if isinstance(item, BackendError):
                    raise item
                yield item
                if item.finish is not None:
                    return
        finally:
            stop.set()

    def close(self) -> None:
        """Cancel all streams and unload our adapters; the server itself runs on."""
        self._pool.shutdown(cancel_futures=True)
        self._http.close()
        self._engine.close()

    def _submit(
        self, wanted: ContinuationRequest, send: Callable[[DecodingStep | BackendError], None], stop: threading.Event
    ) -> None:
        naming = ExitStack()
        try:
            # From now on, not from when a thread is free: meanwhile the version must stay.
            (held,) = naming.enter_context(self._engine.naming([self._key(wanted.model)]))
        except EngineError as error:
            raise BackendError(str(error)) from error
        with self._lock:
            self._submitted += 1

        def done(_: object) -> None:
            naming.close()
            with self._lock:
                self._submitted -= 1

        self._pool.submit(self._stream, held, wanted, send, stop).add_done_callback(done)

    def _key(self, model: ServedModel | None) -> AdapterKey | None:
        if model is None:
            return None
        with self._lock:
            if model not in self._keys:
                raise BackendError(f"{model} is not loaded")
            return self._keys[model]

    def _stream(
        self,
        held: ServedAdapter,
        wanted: ContinuationRequest,
        send: Callable[[DecodingStep | BackendError], None],
        stop: threading.Event,
    ) -> None:
        if stop.is_set():
            return
        with self._lock:
            self._running += 1
        try:
            with self._engine.weights_lock.shared():
                for step in self._steps(held, wanted):
                    if stop.is_set():
                        # The server may still be at work on it: its folder must outlive that.
                        held.lingering = True
                        return
                    send(step)
        except BackendError as error:
            send(error)
        except (httpx2.HTTPError, ValidationError, ValueError) as error:
            send(BackendError(f"the vLLM server broke off: {error!r}"))
        finally:
            with self._lock:
                self._running -= 1

    def _steps(self, held: ServedAdapter, wanted: ContinuationRequest) -> Iterator[DecodingStep]:
        sampling = wanted.sampling
        own_distribution = sampling.top_p == 1.0 and sampling.temperature in (0.0, 1.0)
        if sampling.alternatives is not None and self._engine.processed and not own_distribution:
            raise BackendError(
                "the vLLM server gives log-probabilities after temperature and top_p, which are not the model's own; "
                "ask at temperature 1 and top_p 1, or start it with --logprobs-mode raw_logprobs"
            )
        request = SampleRequest(None, wanted.prompt, sampling.max_new_tokens, sampling.temperature, sampling.seed)
        streamed = {"stream": True, "top_p": sampling.top_p, "logprobs": sampling.alternatives}
        body = completion_body(held.name, request, self._engine.stop_tokens) | streamed
        with self._http.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
                raise BackendError(f"the vLLM server answered {answer.status_code}: {answer.text[:300]}")
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    steps = _steps_of(line[6:], held.name, sampling)
                    yield from steps
                    if steps and steps[-1].finish is not None:
                        return
        raise BackendError("the vLLM server's answer ended before its text did; see its log")

    def _own_scores(self, adapter: Adapter | None, probes: Sequence[Probe]) -> Sequence[FloatArray]:
        """One after the other: our own model has one place for an adapter."""
        with self._reference_lock:
            return self._reference(adapter, probes)


def _steps_of(text: str, name: str, sampling: SamplingOptions) -> list[DecodingStep]:
    """The steps in one event; refuses one that another model made."""
    event = json.loads(text)
    if "error" in event:
        raise BackendError(f"the vLLM server failed: {str(event['error'])[:300]}")
    chunk = _CompletionChunk.model_validate(event)
    if chunk.model != name or len(chunk.choices) > 1:
        raise BackendError(f"asked {name}, got an answer of {chunk.model} with {len(chunk.choices)} choices")
    steps: list[DecodingStep] = []
    for part in chunk.choices:
        likelihoods = _likelihoods(part, sampling)
        tokens = part.token_ids or []
        finish = _finish(part.finish_reason)
        if likelihoods is None:
            steps += [DecodingStep(token) for token in tokens]
        else:
            steps += [DecodingStep(token, None, likely) for token, likely in zip(tokens, likelihoods, strict=True)]
        if finish is not None:
            last = steps.pop() if steps else DecodingStep(None)
            steps.append(DecodingStep(last.token, finish, last.likelihood))
    return steps


def _finish(reason: str | None) -> Literal["stop", "length"] | None:
    match reason:
        case None | "stop" | "length":
            return reason
    raise BackendError(f"the vLLM server broke a text off (finish_reason {reason!r}); see its log")


def _likelihoods(part: _ChoiceDelta, sampling: SamplingOptions) -> list[Likelihood] | None:
    if sampling.alternatives is None:
        return None
    if part.logprobs is None:
        return []
    tops = part.logprobs.top_logprobs or [None] * len(part.logprobs.token_logprobs)
    likelihoods = []
    for chosen, top in zip(part.logprobs.token_logprobs, tops, strict=True):
        if chosen is None:
            raise BackendError("the vLLM server gave a token without its log-probability")
        named = [(int(token.rpartition(":")[2]), logprob) for token, logprob in (top or {}).items()]
        named.sort(key=lambda pair: -pair[1])
        likelihoods.append(Likelihood(chosen, tuple(named[: sampling.alternatives])))
    return likelihoods
