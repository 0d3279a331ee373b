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
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import count
from typing import cast

import httpx2
import numpy as np
from pydantic import ValidationError

from fedmoe.inference.backend import (
    BackendError,
    ContinuationRequest,
    DecodingStep,
    Finish,
    Likelihood,
    SamplingOptions,
    ServedModel,
)
from fedmoe.inference.engine import AdapterKey, Engine, EngineError, SampleRequest
from fedmoe.inference.verify import Probe
from fedmoe.inference.vllm.client import CompletionAnswer, CompletionChoice, completion_body
from fedmoe.inference.vllm.engine import ServedAdapter, VllmEngine
from fedmoe.lora.adapter import Adapter, FloatArray, ShapeError

#: Nats by which one token may differ: two implementations in bfloat16 differ by up to about 0.2, measured.
TOLERANCE = 0.5
_MORE_THAN_ROUNDING = 0.05
# What stands still moves by the rounding of another batch only.
_STANDS_STILL = 0.1
_TOKENS = 4

#: The log-probabilities that our own model gives tokens after prompts with an adapter (None: the base model alone).
Reference = Callable[[Adapter | None, Sequence[Probe]], Sequence[FloatArray]]


@dataclass(frozen=True, slots=True)
class ScoreComparison:
    """The server's continuations of the prompts, and the log-probabilities of their tokens, (T,): served and ours."""

    probes: tuple[Probe, ...]
    served: FloatArray
    ours: FloatArray

    @property
    def gap(self) -> float:
        """The largest difference in nats; NaN if a number is."""
        return float(np.abs(self.served - self.ours).max())


class VersionCheck:
    """Compares versions on `engine` with our own model, and each with the one of its name before it.

    By requests like those of any client: the server continues a few prompts under a version, and our own model says how
    likely each of these tokens is under it. The other way round, scoring given tokens on the server, needs it alone: on
    a CPU vLLM dies where a prompt is scored beside other requests. For every version all answers under way would have
    to end first, while new ones wait. And scoring goes round the server's prefix cache, which answers do not.

    Both checks raise EngineError where the server does not compute what we do; only what was right is remembered.
    """

    def __init__(self, engine: Engine, reference: Reference, prompts: Sequence[tuple[int, ...]]) -> None:
        self._engine = engine
        self._reference = reference
        self._prompts = prompts
        self._former: dict[str, ScoreComparison] = {}

    def base(self) -> None:
        """Refuse a server of another base model."""
        comparison = self._compare(None, None)
        if not comparison.gap <= TOLERANCE:
            raise EngineError(
                f"the server's base model is up to {comparison.gap:.3g} nats a token off ours: it serves another model"
            )

    def version(self, key: AdapterKey, adapter: Adapter) -> None:
        """Refuse a version that the server computes differently from us, or exactly as the one before it."""
        comparison = self._compare(key, adapter)
        if not comparison.gap <= TOLERANCE:
            raise EngineError(
                f"the server's log-probabilities under {key} are up to {comparison.gap:.4g} nats off ours (tolerance "
                f"{TOLERANCE:g}); it computes with other weights or in another precision: see its log, and whether "
                "it serves the same base model"
            )
        former = self._former.get(key.name)
        # Old weights draw the same tokens again. In bfloat16, rounding can hide a move of a few hundredths of a nat.
        if former is not None and comparison.probes == former.probes:
            moved = float(np.abs(comparison.ours - former.ours).max())
            served = float(np.abs(comparison.served - former.served).max())
            if moved > _MORE_THAN_ROUNDING and served < _STANDS_STILL * moved:
                raise EngineError(
                    f"the server's log-probabilities under {key} are those of the version before, although the weights "
                    "differ; it still serves the old one: see its log, and whether it reads the folder that we write"
                )
        self._former[key.name] = comparison

    def _compare(self, key: AdapterKey | None, adapter: Adapter | None) -> ScoreComparison:
        # Drawn tokens say more about the weights than the likeliest, which many weights agree on.
        requests = [SampleRequest(key, prompt, _TOKENS, 1.0, seed) for seed, prompt in enumerate(self._prompts)]
        samples = self._engine.sample(requests)
        probes = tuple(Probe(prompt, sample.tokens) for prompt, sample in zip(self._prompts, samples, strict=True))
        ours, served = self._reference(adapter, probes), [sample.logprobs for sample in samples]
        return ScoreComparison(probes, np.concatenate(served), np.concatenate(ours))


class VllmBackend:
    """A `Backend` over one vLLM server, which `engine` watches; at most `rows` generations are under way there.

    What every version says to `prompts` is verified by log-probabilities before `load` returns, the base model's at the
    start.
    """

    def __init__(
        self, engine: VllmEngine, reference: Reference, prompts: Sequence[tuple[int, ...]], rows: int = 64
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
        """Unload a version once no stream names it."""
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

    def log_likelihoods(self, pairs: Sequence[tuple[Sequence[int], ServedModel]]) -> list[float]:
        """By our own model: the server would hold up all streams to score a prompt."""
        models = {model for _, model in pairs}
        with self._lock:
            missing = sorted(str(model) for model in models if model not in self._adapters)
            adapters = {model: self._adapters[model] for model in models if model in self._adapters}
        if missing:
            raise BackendError(f"{', '.join(missing)} not loaded")
        likelihoods = [0.0] * len(pairs)
        for model, adapter in adapters.items():
            places = [place for place, (text, asked) in enumerate(pairs) if asked == model and len(text) > 1]
            probes = [Probe(tuple(pairs[place][0][:1]), tuple(pairs[place][0][1:])) for place in places]
            for place, scores in zip(places, self._own_scores(adapter, probes) if probes else (), strict=True):
                likelihoods[place] = float(scores.sum(dtype=np.float64))
        return likelihoods

    def busy(self) -> tuple[int, int]:
        """How many streams are under way, and how many wait for a thread."""
        return self._running, max(0, self._submitted - self._running)

    async def generate(self, request: ContinuationRequest) -> AsyncGenerator[DecodingStep, None]:
        """The tokens as they come."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[DecodingStep | BackendError] = asyncio.Queue()
        stop = threading.Event()

        def send(item: DecodingStep | BackendError) -> None:
            with suppress(RuntimeError):  # a loop that is closed has no listeners left
                loop.call_soon_threadsafe(queue.put_nowait, item)

        naming = ExitStack()
        try:
            # From now on, not from when a thread is free: meanwhile the version must stay.
            (held,) = naming.enter_context(self._engine.naming([self._key(request.model)]))
        except EngineError as error:
            raise BackendError(str(error)) from error
        with self._lock:
            self._submitted += 1

        def done(_: object) -> None:
            naming.close()
            with self._lock:
                self._submitted -= 1

        self._pool.submit(self._stream, held, request, send, stop).add_done_callback(done)
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
        self._engine.close()

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
        request: ContinuationRequest,
        send: Callable[[DecodingStep | BackendError], None],
        stop: threading.Event,
    ) -> None:
        if stop.is_set():
            return
        with self._lock:
            self._running += 1
        try:
            with self._engine.weights_lock.shared():
                for step in self._steps(held, request):
                    if stop.is_set():
                        # The server may still be at work on it: its folder must outlive that.
                        held.lingering = True
                        return
                    send(step)
        except BackendError as error:
            send(error)
        except EngineError as error:
            send(BackendError(str(error)))
        except (httpx2.HTTPError, ValidationError, ValueError) as error:
            send(BackendError(f"the vLLM server broke off: {error!r}"))
        finally:
            with self._lock:
                self._running -= 1

    def _steps(self, held: ServedAdapter, request: ContinuationRequest) -> Iterator[DecodingStep]:
        sampling = request.sampling
        own_distribution = sampling.top_p == 1.0 and sampling.temperature in (0.0, 1.0)
        if sampling.alternatives is not None and self._engine.processed and not own_distribution:
            raise BackendError(
                "the vLLM server gives log-probabilities after temperature and top_p, which are not the model's own; "
                "ask at temperature 1 and top_p 1, or start it with --logprobs-mode raw_logprobs"
            )
        plain = SampleRequest(None, request.prompt, sampling.max_new_tokens, sampling.temperature, sampling.seed)
        streamed = {"stream": True, "top_p": sampling.top_p, "logprobs": sampling.alternatives}
        body = completion_body(held.name, plain, self._engine.stop_tokens) | streamed
        with closing(self._engine.client.events(body)) as events:
            for event in events:
                steps = _steps_of(event, held.name, sampling)
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
    chunk = CompletionAnswer.model_validate(event)
    if chunk.model != name or len(chunk.choices) > 1:
        raise BackendError(f"asked {name}, got an answer of {chunk.model} with {len(chunk.choices)} choices")
    steps: list[DecodingStep] = []
    for part in chunk.choices:
        tokens, finish, most = part.token_ids or [], part.finish_reason, sampling.alternatives
        likelihoods = [None] * len(tokens) if most is None else _likelihoods(part, most)
        if finish not in (None, "stop", "length"):
            raise BackendError(f"the vLLM server broke a text off (finish_reason {finish!r}); see its log")
        steps += [DecodingStep(token, None, likely) for token, likely in zip(tokens, likelihoods, strict=True)]
        if finish is not None:
            last = steps.pop() if steps else DecodingStep(None)
            steps.append(DecodingStep(last.token, cast(Finish, finish), last.likelihood))
    return steps


def _likelihoods(part: CompletionChoice, alternatives: int) -> Sequence[Likelihood | None]:
    if part.logprobs is None:
        return []
    tops = part.logprobs.top_logprobs or [None] * len(part.logprobs.token_logprobs)
    likelihoods = []
    for chosen, top in zip(part.logprobs.token_logprobs, tops, strict=True):
        if chosen is None:
            raise BackendError("the vLLM server gave a token without its log-probability")
        named = [(int(token.rpartition(":")[2]), logprob) for token, logprob in (top or {}).items()]
        named.sort(key=lambda pair: -pair[1])
        likelihoods.append(Likelihood(chosen, tuple(named[:alternatives])))
    return likelihoods
