"""Serving while versions arrive: does any request fail or mix versions, and what does a swap cost?

    python benchmarks/bench_serve_swap.py [--base tiny|smollm2] [--requests 1000] [--versions 20] [--clients 8]

A coordinator (a process of its own) holds two experts of random factors; the server follows it in this process and
listens on loopback. `--clients` threads send greedy completions of `--tokens` tokens to the gateway and the experts,
every other one streamed, each over a connection of its own that stays open. Meanwhile versions are pushed, spread
evenly over the requests; every push changes an expert and so the gateway.

`failed` counts answers other than 200; `mixed` those whose tokens are not what the version they name generates alone
(recomputed afterwards for `--check` of the requests, since that costs as much as serving them). Latency is that of a
whole request. `swap_delay` is from the answer to the push until the new expert is served: half the poll interval on
average, then download, load and publish. `quiet` is the same load beforehand with no version arriving.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from harness import pin_threads, write_result

pin_threads(1)

import asyncio  # noqa: E402  # threads are pinned first
import socket  # noqa: E402

import numpy as np  # noqa: E402
import uvicorn  # noqa: E402

from fedmoe.gateway.serve.process import Gate, Running, backend_maker, opened  # noqa: E402
from fedmoe.gateway.serve.service import Limits  # noqa: E402
from fedmoe.lora.adapter import Adapter, FloatVector, Layout, ModuleShape  # noqa: E402
from fedmoe.lora.codec import encode  # noqa: E402
from fedmoe.manifest import Manifest  # noqa: E402
from fedmoe.models.base import LoadedBase, load_base  # noqa: E402
from fedmoe.models.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.models.lora_layers import ALL_LINEAR, find_targets  # noqa: E402
from fedmoe.models.multilora import MultiLora  # noqa: E402
from fedmoe.models.sampling import Wanted, sample  # noqa: E402
from fedmoe.server.protocol import GuardedProtocol  # noqa: E402
from fedmoe.wire.client import CoordinatorClient  # noqa: E402
from fedmoe.wire.messages import UpdateHeader  # noqa: E402

EXPERTS = ("python", "sql")
RANK = 16
SPREAD = {"tiny": 0.05, "smollm2": 0.01}
SEED = 0


@dataclass(frozen=True)
class Answer:
    """One request: who was asked, its prompt, the HTTP status, who made it, its text, and seconds."""

    prompt: tuple[int, ...]
    status: int
    digest: str
    text: str
    seconds: float


def manifest_of(base: LoadedBase) -> Manifest:
    """All linear layers at rank 16."""
    found = find_targets(base.model, ALL_LINEAR)
    modules = tuple(ModuleShape(name, layer.in_features, layer.out_features) for name, layer in found)
    return Manifest(base.identity, Layout(modules, RANK), 2.0 * RANK)


def delta_of(layout: Layout, spread: float, number: int) -> FloatVector:
    return np.random.default_rng([SEED, number]).normal(0.0, spread, layout.size).astype(np.float32)


@contextmanager
def coordinator(folder: Path) -> Iterator[str]:
    """A coordinator process on a free port, healthy."""
    port = free_port()
    command = [sys.executable, "-m", "fedmoe", "coordinator", "--port", str(port), "--state-dir", str(folder)]
    process = subprocess.Popen(
        [*command, "--min-sync-interval", "0"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        with CoordinatorClient(f"http://127.0.0.1:{port}") as api:
            deadline = time.monotonic() + 120
            while not api.healthy():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the coordinator did not start")
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def listening(running: Running) -> Iterator[int]:
    """The server in a thread."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
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

    def push(self, running: Running | None = None) -> float:
        """One new version; seconds until it is served, if there is a server."""
        expert, number = EXPERTS[self._sequence % 2], self._sequence
        self._sequence += 1
        header = UpdateHeader(
            expert=expert, worker="bench", epoch="e1", sequence=number, base_version=number // len(EXPERTS)
        )
        body = encode(self._manifest.layout, delta_of(self._manifest.layout, self._spread, number))
        result = self._api.push(header, body).result
        pushed = time.perf_counter()
        while running is not None and running.service.catalogue.snapshot.models[expert].version < result.version:
            time.sleep(0.001)
        seconds = time.perf_counter() - pushed
        self.note()
        return seconds

    def note(self) -> None:
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
        threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
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
        body: dict[str, object] = {"model": random.Random(index).choice(["gateway", *EXPERTS]), "prompt": prompt}
        body |= {"max_tokens": self._tokens, "temperature": 0, "stream": stream}
        started = time.perf_counter()
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        told = response.read().decode()
        seconds = time.perf_counter() - started
        text = _text(told, stream) if response.status == 200 else told
        return Answer(prompt, response.status, response.headers.get("x-fedmoe-digest", ""), text, seconds)


def _text(told: str, stream: bool) -> str:
    if not stream:
        return str(json.loads(told)["choices"][0]["text"])
    events = [line[6:] for line in told.split("\n\n") if line and line != "data: [DONE]"]
    return "".join(json.loads(event)["choices"][0]["text"] for event in events)


def count_mixed(
    base: LoadedBase, answers: Sequence[Answer], adapters: dict[str, Adapter], tokens: int
) -> tuple[int, int, int]:
    """Answers whose text is not what the version they name says alone; the different ones computed; versions met."""
    multi = MultiLora(base.model)
    stop = frozenset({base.tokenizer.eos_token_id})
    expected: dict[tuple[tuple[int, ...], str], str] = {}
    for prompt, digest in {(answer.prompt, answer.digest) for answer in answers}:
        multi.add("only", adapters[digest])
        (found,) = sample(base.model, multi, [Wanted("only", prompt, tokens, 0.0, 0)], stop)
        multi.remove("only")
        expected[prompt, digest] = str(base.tokenizer.decode(list(found.tokens), skip_special_tokens=True))
    mixed = sum(answer.text != expected[answer.prompt, answer.digest] for answer in answers)
    return mixed, len(expected), len({digest for _, digest in expected})


def latencies(answers: Sequence[Answer], seconds: float) -> dict[str, float]:
    """Median and 99th percentile in milliseconds, and requests a second."""
    times = [answer.seconds for answer in answers]
    return {
        "p50_ms": round(1e3 * statistics.median(times), 1),
        "p99_ms": round(1e3 * float(np.percentile(times, 99)), 1),
        "requests_per_second": round(len(answers) / seconds, 1),
    }


@dataclass(frozen=True)
class Measured:
    """Seconds of the whole load, and of each swap."""

    seconds: float
    delays: list[float]


def swap_while_loaded(load: Load, clients: int, pusher: Pusher, running: Running, plan: tuple[int, int]) -> Measured:
    """All requests of a load while versions arrive, spread over them; `plan` is requests and versions."""
    requests, versions = plan
    delays: list[float] = []

    def push() -> None:
        for number in range(versions):
            while len(load.answers) < number * requests // versions:
                time.sleep(0.002)
            delays.append(pusher.push(running))

    pushing = threading.Thread(target=push)
    pushing.start()
    seconds = load.run(clients)
    pushing.join()
    return Measured(seconds, delays)


@dataclass(frozen=True)
class Measurement:
    """What was seen: the load without and with versions arriving, every adapter there was, and what was left loaded."""

    quiet: Load
    quiet_seconds: float
    load: Load
    measured: Measured
    adapters: dict[str, Adapter]
    left: int


def measure_swaps(base: LoadedBase, options: argparse.Namespace) -> Measurement:
    """Serve, push, ask; everything is closed afterwards and the base model bare again."""
    manifest = manifest_of(base)
    rng = np.random.default_rng(SEED)
    prompts = [tuple(int(t) for t in rng.integers(40, 250, 8 + 8 * (index % 4))) for index in range(8)]
    limits = Limits(128, options.tokens, 4 * options.clients)
    with ExitStack() as stack:
        url = stack.enter_context(coordinator(Path(stack.enter_context(tempfile.TemporaryDirectory()))))
        api, followed = (stack.enter_context(CoordinatorClient(url)) for _ in range(2))
        for expert in EXPERTS:
            api.register(expert, "bench", manifest)
        pusher = Pusher(api, manifest, SPREAD[options.base])
        for _ in EXPERTS:
            pusher.push()
        maker, gate = backend_maker(options.clients, None), Gate("127.0.0.1", 0, None, True)
        running = stack.enter_context(opened(followed, manifest, base, maker, limits, gate, options.poll))
        port = stack.enter_context(listening(running))
        quiet = Load(port, prompts, options.tokens, max(options.clients, options.requests // 5))
        quiet_seconds = quiet.run(options.clients)
        load = Load(port, prompts, options.tokens, options.requests)
        measured = swap_while_loaded(load, options.clients, pusher, running, (options.requests, options.versions))
        return Measurement(quiet, quiet_seconds, load, measured, pusher.adapters, len(running.service.backend.loaded()))


def run(options: argparse.Namespace) -> dict[str, object]:
    """The benchmark's results."""
    # In bfloat16 the last bits decide near ties, and they depend on who else is in the batch.
    base = load_base(options.base, options.device, "fp32")
    found = measure_swaps(base, options)
    answers = found.load.answers
    good = [answer for answer in answers if answer.status == 200]
    checked = random.Random(SEED).sample(good, min(options.check, len(good)))
    mixed, distinct, versions = count_mixed(base, checked, found.adapters, options.tokens)
    delays = found.measured.delays
    return {
        "requests": len(answers),
        "versions_pushed": options.versions,
        "failed": len(answers) - len(good),
        "checked": len(checked),
        "mixed": mixed,
        "distinct_answers": distinct,
        "versions_met": versions,
        "models_loaded_at_the_end": found.left,
        "under_swaps": latencies(answers, found.measured.seconds),
        "quiet": latencies(found.quiet.answers, found.quiet_seconds),
        "swap_delay_ms": {
            "p50": round(1e3 * statistics.median(delays), 1),
            "p99": round(1e3 * float(np.percentile(delays, 99)), 1),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", default="tiny", choices=sorted(SPREAD))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--versions", type=int, default=20)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--poll", type=float, default=0.5, help="seconds between two looks at the coordinator")
    parser.add_argument("--check", type=int, default=1000, help="answers recomputed alone")
    parser.add_argument("--no-write", action="store_true", help="print only")
    options = parser.parse_args()
    pin_torch()
    results = run(options)
    print(json.dumps(results, indent=2))
    if not options.no_write:
        write_result(f"serve_swap_{options.base}", results, vars(options), [SEED])
    if results["failed"] or results["mixed"]:
        raise SystemExit("requests failed or were mixed")


if __name__ == "__main__":
    main()
