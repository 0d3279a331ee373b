"""A vLLM server in memory: the routes, answers and refusals of version 0.32, over a language model of one table.

It keeps vLLM's traps: what it computes for an adapter is cached by (name, path), so weights replaced in place are not
seen; a folder must be there while a request names it; and on a CPU a request for the base model that runs beside one
for an adapter is computed with whatever weights lie in the last slot, which unloading does not empty.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx2
import numpy as np
from numpy.typing import NDArray

from fedmoe.lora.adapter import Adapter
from fedmoe.lora.formats import read_peft

VOCABULARY = 24
END = 0
MODULE = "head"
LIMIT = 256
MODEL = "base"
_TABLE = np.random.default_rng(7).normal(0.0, 1.0, (VOCABULARY, VOCABULARY))

Logits = NDArray[np.float64]


def make_adapter(seed: int, rank: int = 4) -> Adapter:
    """Random factors, A and B both away from zero."""
    rng = np.random.default_rng(seed)
    factors = rng.normal(0.0, 0.5, (2, rank, VOCABULARY)).astype(np.float32)
    return Adapter.from_factors({MODULE: (factors[0], factors[1].T)}, alpha=2.0 * rank)


def expected_scores(adapter: Adapter | None, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> NDArray[np.float32]:
    """What the fake must say about `tokens` after `prompt`."""
    weights = None if adapter is None else _product(adapter)
    places = [*prompt[-1:], *tokens[:-1]]
    values = [_log_softmax(_logits(weights, before))[token] for before, token in zip(places, tokens, strict=True)]
    return np.array(values, np.float32)


def _product(adapter: Adapter) -> Logits:
    a, b = adapter.module(MODULE)
    return np.asarray(adapter.scale * (b.astype(np.float64) @ a))


def _logits(weights: Logits | None, before: int) -> Logits:
    return np.asarray(_TABLE[:, before] if weights is None else _TABLE[:, before] + weights[:, before])


def _log_softmax(logits: Logits) -> Logits:
    shifted = logits - logits.max()
    return np.asarray(shifted - np.log(np.exp(shifted).sum()))


@dataclass
class FakeVllm:
    """The server's settings, what it holds, and every request it got; `hold` keeps completions waiting while clear."""

    routes: bool = True
    lora: bool = True
    max_loras: int = 8
    max_rank: int = 16
    logprobs_mode: str = "processed_logprobs"
    metrics: bool = True
    replicas: int = 1
    token: str | None = None
    adapters: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[str, Mapping[str, object]]] = field(default_factory=list)
    failures: list[int | httpx2.HTTPError] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    hold: threading.Event = field(default_factory=threading.Event)
    busiest: int = 0
    _running: dict[int, str] = field(default_factory=dict)
    _mixed: set[int] = field(default_factory=set)
    _slots: dict[int, Logits] = field(default_factory=dict)
    _loads: int = 0
    _cache: dict[tuple[str, str], Logits] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def __post_init__(self) -> None:
        self.hold.set()

    @property
    def transport(self) -> httpx2.MockTransport:
        return httpx2.MockTransport(self.answer)

    def bodies(self, path: str) -> list[Mapping[str, object]]:
        """The bodies that were sent to `path`."""
        return [body for seen, body in self.seen if seen == path]

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        path = request.url.path
        body = json.loads(request.content) if request.content else {}
        if path == "/v1/completions":
            return self._completion_in_turn(body)
        with self._lock:
            self.seen.append((path, body))
            if self.token and request.headers.get("authorization") != f"Bearer {self.token}":
                return httpx2.Response(401, json={"error": "Unauthorized"})
            if path == "/v1/models":
                return self._models()
            if path == "/metrics" and self.metrics:
                return httpx2.Response(200, text=self._metrics())
            if path == "/v1/load_lora_adapter" and self.routes:
                return self._load(str(body["lora_name"]), str(body["lora_path"]))
            if path == "/v1/unload_lora_adapter" and self.routes:
                return self._unload(str(body["lora_name"]))
            return httpx2.Response(404, json={"detail": "Not Found"})

    def _models(self) -> httpx2.Response:
        cards = [{"id": MODEL, "root": "/models/base", "parent": None, "max_model_len": LIMIT}]
        cards += [{"id": name, "root": path, "parent": MODEL} for name, path in self.adapters.items()]
        return httpx2.Response(200, json={"object": "list", "data": cards})

    def _metrics(self) -> str:
        lines = [
            f'vllm:num_requests_running{{engine="{index}",model_name="base"}} 0.0' for index in range(self.replicas)
        ]
        if self.lora:
            lines.append("# TYPE vllm:lora_requests_info gauge")
        if self.lora and self.bodies("/v1/completions"):
            lines.append(f'vllm:lora_requests_info{{max_lora="{self.max_loras}",running_lora_adapters=""}} 1.7e+09')
        return "\n".join(lines) + "\n"

    def _load(self, name: str, path: str) -> httpx2.Response:
        if not name or not path:
            return _refusal(400, "Both 'lora_name' and 'lora_path' must be provided.")
        if name in self.adapters:
            return _refusal(400, f"The lora adapter '{name}' has already been loaded.")
        if not self.lora:
            return _refusal(500, "Call to add_lora method failed: LoRA is not enabled. Use --enable-lora")
        if not Path(path).is_dir():
            return _refusal(404, f"Loading lora {name} failed: No adapter found for {path}")
        adapter = _read(path)
        if adapter.rank > self.max_rank:
            return _refusal(500, f"LoRA rank {adapter.rank} is greater than max_lora_rank {self.max_rank}.")
        self._slots[self._loads % self.max_loras] = self._cache.setdefault((name, path), _product(adapter))
        self._loads += 1
        self.adapters[name] = path
        return httpx2.Response(200, text=f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, name: str) -> httpx2.Response:
        if name not in self.adapters:
            return _refusal(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return httpx2.Response(200, text=f"Success: LoRA adapter '{name}' removed successfully.")

    def _completion_in_turn(self, body: Mapping[str, object]) -> httpx2.Response:
        with self._lock:
            number = len(self.seen)
            self.seen.append(("/v1/completions", body))
            self._running[number] = str(body["model"])
            self.busiest = max(self.busiest, len(self._running))
            if set(self._running.values()) != {MODEL}:
                self._mixed |= {one for one, model in self._running.items() if model == MODEL}
            failure = self.failures.pop(0) if self.failures else None
        try:
            self.started.set()
            assert self.hold.wait(20), "a test kept the server waiting for ever"
            if isinstance(failure, httpx2.HTTPError):
                raise failure
            if failure is not None:
                return _refusal(failure, "the server is overloaded or broken")
            return self._completion(body, number)
        finally:
            with self._lock:
                del self._running[number]

    def _completion(self, body: Mapping[str, object], number: int) -> httpx2.Response:
        name = str(body["model"])
        prompt = body["prompt"]
        assert isinstance(prompt, list)
        if name != MODEL and name not in self.adapters:
            return _refusal(404, f"The model `{name}` does not exist. Valid aliases: base.")
        if len(prompt) + int(str(body["max_tokens"])) > LIMIT:
            return _refusal(400, f"This model's maximum context length is {LIMIT} tokens.")
        weights = self._slots.get(self.max_loras - 1) if number in self._mixed else None
        if name != MODEL:
            path = self.adapters[name]
            assert Path(path).is_dir(), "the engine would die: an adapter's folder went while a request named it"
            weights = self._cache[name, path]
        return httpx2.Response(200, json={"model": name, "choices": [self._choice(body, prompt, weights)]})

    def _choice(self, body: Mapping[str, object], prompt: list[int], weights: Logits | None) -> dict[str, object]:
        temperature, most = float(str(body["temperature"])), int(str(body["max_tokens"]))
        rng = np.random.default_rng(int(str(body["seed"])))
        tokens: list[int] = []
        places: list[Logits] = []
        while len(tokens) < most and END not in tokens:
            logits = _logits(weights, (prompt + tokens)[-1])
            scaled = logits / (temperature or 1.0)
            noise = rng.gumbel(size=VOCABULARY) if temperature else 0.0
            tokens.append(int(np.argmax(scaled + noise)))
            places.append(self._reported(logits, scaled))
        return {
            "index": 0,
            "text": "",
            "finish_reason": "stop" if END in tokens else "length",
            "token_ids": tokens,
            "logprobs": _logprobs(tokens, places, int(str(body["logprobs"]))),
            "prompt_logprobs": self._prompt(prompt, weights) if "prompt_logprobs" in body else None,
        }

    def _reported(self, raw: Logits, processed: Logits) -> Logits:
        logits = processed if self.logprobs_mode.startswith("processed") else raw
        return _log_softmax(logits) if self.logprobs_mode.endswith("logprobs") else logits

    def _prompt(self, prompt: list[int], weights: Logits | None) -> list[dict[str, object] | None]:
        scored: list[dict[str, object] | None] = [None]
        for before, token in pairwise(prompt):
            value = _log_softmax(_logits(weights, before))[token]
            scored.append({str(token): {"logprob": float(value), "rank": 1, "decoded_token": "x"}})
        return scored


def _logprobs(tokens: list[int], places: list[Logits], count: int) -> dict[str, object]:
    top = []
    for token, place in zip(tokens, places, strict=True):
        shown = {*np.argsort(-place)[:count].tolist(), token}
        top.append({f"token_id:{one}": float(place[one]) for one in sorted(shown)})
    chosen = [float(place[token]) for token, place in zip(tokens, places, strict=True)]
    return {"tokens": [f"token_id:{token}" for token in tokens], "token_logprobs": chosen, "top_logprobs": top}


def _read(path: str) -> Adapter:
    return read_peft({file.name: file.read_bytes() for file in Path(path).iterdir()})


def _refusal(status: int, message: str) -> httpx2.Response:
    return httpx2.Response(status, json={"error": {"message": message, "type": "Error", "param": None, "code": status}})
