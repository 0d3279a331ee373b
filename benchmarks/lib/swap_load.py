"""The parts of `bench_serve_swap.py` that make the load: versions pushed to a coordinator, clients that ask."""

from __future__ import annotations

import asyncio
import http.client
import json
import random
import socket
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import uvicorn

from fedmoe.gateway.serve.app import GatewayServer
from fedmoe.lora.adapter import Adapter, FloatVector, Layout, ModuleShape
from fedmoe.lora.codec import encode
from fedmoe.lora.manifest import Manifest
from fedmoe.models.base import LoadedBase
from fedmoe.models.lora_layers import ALL_LINEAR, find_targets
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import UpdateHeader
from fedmoe.wire.http.serving import GuardedProtocol

EXPERTS = ("python", "sql")
RANK = 16
SEED = 0
_LONGEST_SWAP = 300.0


@dataclass(frozen=True)
class Answer:
    """One request: its prompt, the HTTP status, whom it asked and who made it, its tokens as text with their natural
    log-probabilities (the error where it failed), and seconds."""

    prompt: tuple[int, ...]
    status: int
    model: str
    digest: str
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    seconds: float


def manifest_of(base: LoadedBase) -> Manifest:
    """All linear layers at rank 16."""
    found = find_targets(base.model, ALL_LINEAR)
    modules = tuple(ModuleShape(name, layer.in_features, layer.out_features) for name, layer in found)
    return Manifest(base.identity, Layout(modules, RANK), 2.0 * RANK)


@contextmanager
def listening(running: GatewayServer) -> Iterator[int]:
    """The server in a thread."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()  # clients may come before the thread does
    config = uvicorn.Config(running.app, http=GuardedProtocol, ws="none", lifespan="off", log_config=None)
    server = uvicorn.Server(config)

    def run() -> None:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


class Pusher:
    """Pushes versions of the experts in turn and remembers every adapter by digest."""

    def __init__(self, api: CoordinatorClient, manifest: Manifest, spread: float) -> None:
        self._api = api
        self._manifest = manifest
        self._spread = spread
        self._sequence = 0
        self.adapters: dict[str, Adapter] = {}

    def push(self, running: GatewayServer | None = None) -> float:
        """One new version; seconds until it is served, if there is a server."""
        expert, number = EXPERTS[self._sequence % 2], self._sequence
        self._sequence += 1
        header = UpdateHeader(
            expert=expert, worker="bench", epoch="e1", sequence=number, base_version=number // len(EXPERTS)
        )
        result = self._api.push(header, encode(self._manifest.layout, self._delta(number))).result
        pushed = time.perf_counter()
        while running is not None and running.service.catalogue.snapshot.models[expert].version < result.version:
            if time.perf_counter() > pushed + _LONGEST_SWAP:
                raise RuntimeError(f"{expert} version {result.version} is not served: {running.watcher.health()}")
            time.sleep(0.001)
        seconds = time.perf_counter() - pushed
        self._note()
        return seconds

    def _delta(self, number: int) -> FloatVector:
        size = self._manifest.layout.size
        return np.random.default_rng([SEED, number]).normal(0.0, self._spread, size).astype(np.float32)

    def _note(self) -> None:
        """Remember what the coordinator has now."""
        for expert in EXPERTS:
            pulled = self._api.pull_expert(expert)
            assert pulled is not None
            self.adapters[pulled.digest] = pulled.adapter
        gateway = self._api.pull_gateway()
        assert gateway is not None
        self.adapters[gateway.digest] = gateway.adapter


class Load:
    """Clients that ask until all requests are answered."""

    def __init__(self, port: int, prompts: Sequence[tuple[int, ...]], tokens: int, requests: int) -> None:
        self._port = port
        self._prompts = prompts
        self._tokens = tokens
        self._left = iter(range(requests))
        self._lock = threading.Lock()
        self.answers: list[Answer] = []

    def run(self, clients: int) -> float:
        """Seconds until all requests were answered."""
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            for future in [pool.submit(self._client) for _ in range(clients)]:
                future.result()
        return time.perf_counter() - started

    def _client(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=600)
        while True:
            with self._lock:
                index = next(self._left, None)
            if index is None:
                return
            answer = self._ask(connection, index)
            with self._lock:
                self.answers.append(answer)

    def _ask(self, connection: http.client.HTTPConnection, index: int) -> Answer:
        prompt, stream = self._prompts[index % len(self._prompts)], index % 2 == 1
        model = random.Random(index).choice(["gateway", *EXPERTS])
        body: dict[str, object] = {"model": model, "prompt": prompt, "logprobs": 0}
        body |= {"max_tokens": self._tokens, "temperature": 0, "stream": stream}
        started = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        told = response.read().decode()
        seconds = time.perf_counter() - started
        digest = response.headers.get("x-fedmoe-digest", "")
        tokens, logprobs = _tokens(told, stream) if response.status == 200 else ((told,), ())
        whole = bool(logprobs) and len(logprobs) == len(tokens)
        return Answer(prompt, response.status if whole else 500, model, digest, tokens, logprobs, seconds)


def _tokens(told: str, stream: bool) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """What was said and how likely it was; a stream that broke off has its error in place of the tokens."""
    events = [line[6:] for line in told.split("\n\n") if line and line != "data: [DONE]"] if stream else [told]
    parts = [json.loads(event) for event in events]
    if any("error" in part for part in parts) or (stream and not told.rstrip().endswith("data: [DONE]")):
        return (told,), ()
    found = [choice["logprobs"] for part in parts for choice in part["choices"] if choice["logprobs"]]
    tokens = tuple(str(token) for one in found for token in one["tokens"])
    return tokens, tuple(float(value) for one in found for value in one["token_logprobs"])


def latencies(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Median and 99th percentile in milliseconds, and requests a second."""
    return milliseconds([answer.seconds for answer in answers]) | {
        "requests_per_second": round(len(answers) / seconds, 1)
    }


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    return {
        "p50_ms": round(1e3 * statistics.median(seconds), 1),
        "p99_ms": round(1e3 * float(np.percentile(seconds, 99)), 1),
    }


@dataclass(frozen=True)
class Swaps:
    """Seconds of the whole load and of each swap, and how many requests were answered when the last was served."""

    seconds: float
    delays: list[float]
    answered: int


def swap_while_loaded(load: Load, clients: int, pusher: Pusher, running: GatewayServer, plan: tuple[int, int]) -> Swaps:
    """All requests of a load while versions arrive, spread over them; `plan` is requests and versions."""
    requests, versions = plan

    def push() -> tuple[list[float], int]:
        delays = []
        for number in range(versions):
            while len(load.answers) < number * requests // versions:
                time.sleep(0.002)
            delays.append(pusher.push(running))
        return delays, len(load.answers)

    with ThreadPoolExecutor(1) as pool:
        pushing = pool.submit(push)
        seconds = load.run(clients)
        return Swaps(seconds, *pushing.result())
