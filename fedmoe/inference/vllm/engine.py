"""The rollout engine on a live vLLM server: every version of every policy is an adapter of its own there.

Three traps of vLLM 0.32 shape this engine. Its prefix cache knows an adapter by name and path, so after weights were
replaced in place it continues long prompts from the old ones (measured: 0.36 nats off), and a check of scores does not
see it, since scoring goes round that cache. A name loaded "in place" is read from disk again at every step. So every
version gets a new name and a new folder, nothing is ever replaced, and a folder goes only when no request can name it.
And on a CPU a request for the base model in one batch with adapters is computed with the weights in the last adapter
slot, even unloaded ones (measured: 0.34 nats off; vllm-project/vllm#48421). So beside adapters the base model is asked
for as an adapter of zeros, which takes one slot and gives exactly the base model's numbers.
"""

from __future__ import annotations

import re
import secrets
import shutil
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import httpx2

from fedmoe.inference.engine import AdapterKey, EngineError, Sample, SampleRequest
from fedmoe.inference.fair_lock import FairLock
from fedmoe.inference.vllm.client import (
    CompletionChoice,
    ServerTimeoutError,
    VllmClient,
    check_request,
    completion_body,
    logprobs_are_processed,
    sample_of,
    scores_of,
    scoring_body,
)
from fedmoe.lora.adapter import Adapter, FloatArray
from fedmoe.lora.formats import peft_files
from fedmoe.runtime.files import FolderInUseError, lock_folder, write_folder_atomic

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
# `name@version.random`, and what a write that was broken off leaves beside it: nothing else here is ever deleted.
_OWN_FOLDER = re.compile(r"\.?[A-Za-z0-9][A-Za-z0-9_.-]*@\d+\.[0-9a-f]{8}(-[0-9a-f]{8}(-old)?)?")
_ZEROS = "zeros"
_PROBE_PROMPT = (1, 2, 3, 4, 5, 6, 7)
_PROBE_TEMPERATURE = 2.0


@dataclass
class ServedAdapter:
    """A model on the server: its name and folder there, and how many requests name it at this moment.

    `lingering`: a request was given up while the server may still work on it, so its folder must outlive it.
    """

    name: str
    folder: Path
    in_flight: int = 0
    lingering: bool = False


class VllmEngine:
    """An `Engine` over one vLLM server; token ids in, token ids out.

    `model` is the name the base model is served under. `adapters_dir` belongs to this engine alone while it lives and
    must be readable by the server under the same path. `stop_tokens` end a continuation beside the tokenizer's own
    end-of-sequence token, which the server knows. Requests run `concurrency` at a time, so that the server
    batches those of all policies together. The server needs --enable-lora, VLLM_ALLOW_RUNTIME_LORA_UPDATING=1,
    --max-loras of at least policies x (staleness + 2) + 1, and --logprobs-mode processed_logprobs for temperatures
    other than 0 and 1; what is missing is refused here, with EngineError. Safe to use from several threads.
    """

    def __init__(
        self,
        url: str,
        model: str,
        adapters_dir: Path,
        stop_tokens: Collection[int] = (),
        token: str | None = None,
        timeout: float = 600.0,
        concurrency: int = 256,
        attempts: int = 4,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        self._model = model
        self._folder = adapters_dir.resolve()
        self.stop_tokens = sorted(stop_tokens)
        self._timeout = timeout
        self._held: dict[AdapterKey, ServedAdapter] = {}
        self._base = ServedAdapter(model, self._folder)
        self._changed = threading.Condition()
        #: Generating shares it, scoring excludes all else: vLLM 0.32 dies (on a CPU) where a prompt is scored in one
        #: batch with other requests, since it applies their rows' adapters to the prompt's logits.
        self.weights_lock = FairLock()
        #: The most tokens of prompt and answer together, if the server says so.
        self.context: int | None = None
        self._changing = threading.Lock()
        self._closed = False
        self._folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_folder(self._folder)
        except FolderInUseError as error:
            raise EngineError(f"{error}; give every engine an adapters folder of its own") from error
        self.client = VllmClient(url, token, timeout, concurrency, attempts, transport)
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="vllm-request")
        try:
            self._check_server()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(self, key: AdapterKey, adapter: Adapter) -> None:
        """Make one version of one policy available to `sample` and `score`.

        Raises EngineError for a key that is loaded, a rank above the server's, or more adapters than its `max_loras`.
        """
        if not _SAFE_NAME.fullmatch(key.name) or key.version < 0:
            raise EngineError(f"{key} cannot name an adapter; use letters, digits, '_', '.', '-' and a version from 0")
        with self._changing:
            if self._closed:
                raise EngineError("the engine is closed")
            if key in self._held:
                raise EngineError(f"{key} is loaded already; a version is loaded once and never changes")
            if self._max_loras is not None and len(self._held) + 1 >= self._max_loras:
                raise EngineError(
                    f"the server batches at most {self._max_loras} adapters, one of them for the base model, and holds "
                    f"{len(self._held)} versions: unload old ones, or start it with --max-loras of at least "
                    "policies x (staleness + 2) + 1"
                )
            if self._base.name == self._model:
                # From now on the base model is asked for as an adapter of zeros, never again by its name.
                zeros = self._put(AdapterKey(_ZEROS, 0), Adapter.zeros(adapter.layout.with_rank(1), 1.0))
                with self._changed:
                    plain, self._base = self._base, zeros
                    self._await_idle(plain)
            held = self._put(key, adapter)
            with self._changed:
                self._held[key] = held

    def unload(self, key: AdapterKey) -> None:
        """Unload a version once the requests that name it are answered; new ones are refused from now on."""
        with self._changing:
            held = self._retire(key)
            try:
                self.client.unload(held.name)
            except BaseException:
                with self._changed:
                    self._held[key] = held
                raise
            if not held.lingering:
                shutil.rmtree(held.folder)

    def loaded(self) -> frozenset[AdapterKey]:
        """The versions that can be sampled from."""
        with self._changed:
            return frozenset(self._held)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """Answer all requests at once, in their order; one failure fails them all, with EngineError."""
        for request in requests:
            check_request(request, self.processed)
        with self.naming([request.adapter for request in requests]) as held:
            pairs = zip(held, requests, strict=True)
            bodies = [completion_body(adapter.name, request, self.stop_tokens) for adapter, request in pairs]
            futures = [self._pool.submit(self._complete_shared, *pair) for pair in zip(held, bodies, strict=True)]
            wait(futures, return_when=FIRST_EXCEPTION)
            for future in futures:
                future.cancel()  # does nothing to those that are done or under way
            wait(futures)
            # The one that failed says why: a cancelled one tells nothing.
            failed = [future for future in futures if not future.cancelled() and future.exception() is not None]
            choices = [future.result() for future in failed[:1] or futures]
        return [sample_of(choice, request) for choice, request in zip(choices, requests, strict=True)]

    def score(self, key: AdapterKey | None, prompt: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """The log-probability (temperature 1) of each of `tokens` after `prompt` (not empty), float32 (T,)."""
        if not prompt or not tokens:
            raise EngineError(f"scoring needs a prompt and tokens, got {len(prompt)} and {len(tokens)} token ids")
        with self.naming([key]) as held, self.weights_lock.exclusive():
            choice = self._complete_one(held[0], scoring_body(held[0].name, prompt, tokens))
        return scores_of(choice, len(prompt), tokens)

    def close(self) -> None:
        """Unload this engine's adapters and remove its folders; the server itself runs on."""
        with self._changing:
            if self._closed:
                return
            for key in self.loaded():
                # Whatever became of the server, the folders here must go.
                with suppress(EngineError):
                    self.client.unload(self._retire(key).name)
            if self._base.name != self._model:
                with suppress(EngineError):
                    self.client.unload(self._base.name)
            self._release()

    def _release(self) -> None:
        self._closed = True
        self._pool.shutdown(cancel_futures=True)
        self.client.close()
        self._sweep_folders()
        self._lock.close()

    def _sweep_folders(self) -> None:
        for folder in self._folder.iterdir():
            if _OWN_FOLDER.fullmatch(folder.name):
                shutil.rmtree(folder)

    def _check_server(self) -> None:
        served = self.client.models()
        if self._model not in served:
            raise EngineError(f"the server has no model {self._model!r}; it serves {', '.join(sorted(served))}")
        self.context = served[self._model].max_model_len
        self.client.check_lora_routes()
        if self.client.facts().lora is False:
            raise EngineError("the vLLM server runs without adapters; start it with --enable-lora")
        # Whether log-probabilities are those after temperature, found by asking for the same place at two.
        body = {**completion_body(self._model, SampleRequest(None, _PROBE_PROMPT, 1, 1.0, 0)), "logprobs": 5}
        plain = self.client.complete(body)
        flattened = self.client.complete({**body, "temperature": _PROBE_TEMPERATURE})
        self.processed = logprobs_are_processed(plain, flattened, _PROBE_TEMPERATURE)
        facts = self.client.facts()  # again: the number of adapter slots shows only after a first request
        if facts.replicas is not None and facts.replicas > 1:
            raise EngineError(
                f"the server has {facts.replicas} data-parallel replicas and an adapter reaches only one of them; "
                "start it without --data-parallel-size"
            )
        self._max_loras = facts.max_loras
        # What an engine that was killed left behind: the folder is ours, so no one else uses its adapters.
        for name, card in served.items():
            path = Path(card.root or "")
            if path.parent == self._folder and _OWN_FOLDER.fullmatch(path.name):
                self.client.unload(name)
        self._sweep_folders()

    def _put(self, key: AdapterKey, adapter: Adapter) -> ServedAdapter:
        # Keys may come back in another run on the same server; the server must never take one for the other.
        name = f"{key}.{secrets.token_hex(4)}"
        held = ServedAdapter(name, self._folder / name)
        write_folder_atomic(held.folder, peft_files(adapter, self._model))
        try:
            self.client.load(name, str(held.folder))
            served = self.client.models().get(name)
            if served is None or served.root != str(held.folder):
                raise EngineError(f"the server took {name} but lists it as {served!r}, expected {held.folder}")
        except BaseException:
            with suppress(EngineError):
                self.client.unload(name)
            shutil.rmtree(held.folder)
            raise
        return held

    def _retire(self, key: AdapterKey) -> ServedAdapter:
        """Take `key` out of use and wait until nothing names it."""
        with self._changed:
            held = self._held.pop(key, None)
            if held is None:
                raise EngineError(f"{key} is not loaded; loaded: {_listed(self._held)}")
            try:
                self._await_idle(held)
            except EngineError:
                self._held[key] = held
                raise
            return held

    def _await_idle(self, held: ServedAdapter) -> None:
        if not self._changed.wait_for(lambda: held.in_flight == 0, self._timeout):
            raise EngineError(f"{held.name} is still named by {held.in_flight} requests after {self._timeout:g} s")

    @contextmanager
    def naming(self, keys: Sequence[AdapterKey | None]) -> Iterator[list[ServedAdapter]]:
        """The served adapters of `keys`, none of which is unloaded before the block ends."""
        with self._changed:
            if self._closed:
                raise EngineError("the engine is closed")
            unknown = {key for key in keys if key is not None and key not in self._held}
            if unknown:
                raise EngineError(f"not loaded: {_listed(unknown)}; loaded: {_listed(self._held)}")
            held = [self._base if key is None else self._held[key] for key in keys]
            for adapter in held:
                adapter.in_flight += 1
        try:
            yield held
        finally:
            with self._changed:
                for adapter in held:
                    adapter.in_flight -= 1
                self._changed.notify_all()

    def _complete_shared(self, held: ServedAdapter, body: dict[str, object]) -> CompletionChoice:
        with self.weights_lock.shared():
            return self._complete_one(held, body)

    def _complete_one(self, held: ServedAdapter, body: dict[str, object]) -> CompletionChoice:
        try:
            return self.client.complete(body)
        except ServerTimeoutError:
            held.lingering = True
            raise


def _listed(keys: Iterator[AdapterKey] | set[AdapterKey] | dict[AdapterKey, ServedAdapter]) -> str:
    return ", ".join(str(key) for key in sorted(keys)) or "nothing"
