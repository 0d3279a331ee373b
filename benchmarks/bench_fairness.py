"""What an honest worker keeps of its rate beside one token that takes all it can get.

    python benchmarks/bench_fairness.py [--seconds 2] [--windows 8]

A coordinator process on loopback asks for tokens. The honest worker has one of its own and pushes updates of 1 MB,
each as soon as the one before is answered: an answer means on disk, in the journal and applied. Beside it, in a process
of its own, the holder of another token tries one thing from many connections, again as soon as it is answered:

    silent      70 uploads that send their head and 1000 bytes, and then nothing
    heads       70 uploads that send their head and nothing else
    requests    64 connections that ask for GET /list_experts
    register    16 connections that register an expert of a new name each time
    guesses     64 connections that ask with a token nobody knows

Windows alone and beside each attack take turns, so that a change of the machine meets both. The attacker's process
takes some of the same machine; `attempts` says how often its connections were begun anew.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from typing import Any
from urllib.parse import urlencode

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
import psutil  # noqa: E402
from lib.coordinator_process import coordinator_process  # noqa: E402

from fedmoe.lora.adapter import Layout, ModuleShape  # noqa: E402
from fedmoe.lora.codec import encode  # noqa: E402
from fedmoe.lora.manifest import BaseModel, Manifest  # noqa: E402
from fedmoe.wire.client import CoordinatorClient  # noqa: E402
from fedmoe.wire.contract.administration import TokenRequest  # noqa: E402
from fedmoe.wire.contract.messages import SAFETENSORS, ManifestMessage  # noqa: E402

ADMIN, JOIN = "admin-token-of-this-benchmark-0", "join-token-of-this-benchmark-00"
LAYOUT = Layout(tuple(ModuleShape(f"layers.{n}.q", 1024, 1024) for n in range(8)), 16)
TINY = Layout((ModuleShape("layers.0.q", 6, 4),), 2)
CONNECTIONS = {"silent": 70, "heads": 70, "requests": 64, "register": 16, "guesses": 64}


def manifest(layout: Layout) -> Manifest:
    return Manifest(BaseModel("bench/base", "main", "a" * 64, "b" * 64), layout, 32.0)


def digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


class Honest:
    """Pushes one update after the other, and counts those that were taken."""

    def __init__(self, port: int, token: str) -> None:
        self._port, self._token = port, token
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._flat = np.random.default_rng(0).normal(0, 0.01, LAYOUT.size).astype(np.float32)
        self._sequence = 0
        self.answers: dict[int, int] = {}

    def push(self) -> None:
        self._flat[:8] = np.random.default_rng(self._sequence).normal(0, 0.01, 8)
        body = encode(LAYOUT, self._flat)
        query = {"expert": "python", "worker": "honest", "epoch": "e1", "sequence": self._sequence, "base_version": 0}
        headers = {"Content-Type": SAFETENSORS, "Content-Digest": digest(body)}
        headers["Authorization"] = f"Bearer {self._token}"
        self._sequence += 1
        try:
            self._connection.request("POST", f"/push_expert_update?{urlencode(query)}", body, headers)
            answer = self._connection.getresponse()
            answer.read()
            status, again = answer.status, float(answer.headers.get("Retry-After", 0))
        except (OSError, http.client.HTTPException):
            self._connection.close()
            status, again = 0, 0.1
        self.answers[status] = self.answers.get(status, 0) + 1
        if status != 200:
            time.sleep(again)

    def rate(self, seconds: float) -> float:
        """Updates a second that were taken."""
        before, started = self.answers.get(200, 0), time.perf_counter()
        while time.perf_counter() - started < seconds:
            self.push()
        return (self.answers.get(200, 0) - before) / (time.perf_counter() - started)


def attack(kind: str, port: int, token: str, go: Event, stop: Event, attempts: Any) -> None:
    """A process: does one thing from many connections while `go` is set, until it is told to stop."""

    def work(number: int) -> None:
        while not stop.is_set():
            if not go.wait(0.2):
                continue
            with suppress(OSError, http.client.HTTPException):
                once(kind, port, token, number, go)
            with attempts.get_lock():
                attempts.value += 1

    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(CONNECTIONS[kind])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def once(kind: str, port: int, token: str, number: int, go: Event) -> None:
    if kind in ("silent", "heads"):
        upload_nothing(kind, port, token, number, go)
        return
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Authorization": f"Bearer {'nobody-knows-this-token-0000' if kind == 'guesses' else token}"}
    try:
        while go.is_set():
            if kind == "register":
                name = f"e{os.getpid()}-{number}-{time.monotonic_ns()}"
                message = {"expert": name, "worker": "greedy", "manifest": manifest_json(TINY)}
                headers["Content-Type"] = "application/json"
                connection.request("POST", "/register_expert", json.dumps(message), headers)
            else:
                connection.request("GET", "/list_experts", headers=headers)
            connection.getresponse().read()
    finally:
        connection.close()


def manifest_json(layout: Layout) -> object:
    return ManifestMessage.of(manifest(layout)).model_dump(mode="json")


def upload_nothing(kind: str, port: int, token: str, number: int, go: Event) -> None:
    query = {"expert": "python", "worker": f"greedy{number}", "epoch": "e1", "sequence": 0, "base_version": 0}
    lines = [
        f"POST /push_expert_update?{urlencode(query)} HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Type: {SAFETENSORS}",
        f"Content-Digest: {digest(b'')}",
        f"Content-Length: {LAYOUT.size * 4}",
        f"Authorization: Bearer {token}",
    ]
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + (bytes(1000) if kind == "silent" else b""))
        connection.settimeout(0.5)
        while go.is_set():
            with suppress(TimeoutError):
                if not connection.recv(4096):
                    return


def token_for(port: int, worker: str | None) -> str:
    with CoordinatorClient(f"http://127.0.0.1:{port}", ADMIN) as client:
        return client.make_token(TokenRequest(role="worker" if worker else "join", worker=worker, label="bench")).token


def cpu_seconds(process: int) -> float:
    """Processor time that a process has used."""
    used = psutil.Process(process).cpu_times()
    return float(used.user + used.system)


def measure_attack(
    kind: str, port: int, coordinator: int, honest: Honest, seconds: float, windows: int
) -> dict[str, object]:
    """The honest worker's rates alone and beside an attack, in turns; which comes first takes turns too."""
    context = get_context("spawn")
    go, stop, attempts = context.Event(), context.Event(), context.Value("q", 0)
    process = context.Process(target=attack, args=(kind, port, token_for(port, None), go, stop, attempts))
    process.start()
    rates: dict[bool, list[float]] = {False: [], True: []}
    costs: dict[bool, list[float]] = {False: [], True: []}
    for window in range(windows):
        for attacked in (False, True) if window % 2 else (True, False):
            (go.set if attacked else go.clear)()
            time.sleep(1.0)
            before, taken = cpu_seconds(coordinator), honest.answers.get(200, 0)
            rates[attacked].append(honest.rate(seconds))
            taken = honest.answers.get(200, 0) - taken
            costs[attacked].append((cpu_seconds(coordinator) - before) / max(1, taken))
    go.clear()
    stop.set()
    process.join(30)
    kept = [beside / alone for alone, beside in zip(rates[False], rates[True], strict=True)]
    return {
        "alone_updates_per_second": rates[False],
        "beside_updates_per_second": rates[True],
        "kept_of_medians": statistics.median(rates[True]) / statistics.median(rates[False]),
        "kept_by_window": {"median": statistics.median(kept), "minimum": min(kept), "maximum": max(kept)},
        "coordinator_cpu_seconds_per_update": {
            "alone": statistics.median(costs[False]),
            "beside": statistics.median(costs[True]),
        },
        "attempts": attempts.value,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--attacks", nargs="+", choices=list(CONNECTIONS), default=list(CONNECTIONS))
    parser.add_argument("--name", default="fairness")
    given = parser.parse_args()
    tokens = {"FEDMOE_TOKEN": JOIN, "FEDMOE_ADMIN_TOKEN": ADMIN}
    with (
        tempfile.TemporaryDirectory(prefix="fedmoe-fairness-") as state,
        coordinator_process(state, variables=tokens) as running,
    ):
        with CoordinatorClient(running.url, JOIN) as client:
            client.register("python", "honest", manifest(LAYOUT))
        honest = Honest(running.port, token_for(running.port, "honest"))
        honest.rate(3.0)
        results: dict[str, object] = {"load_average_before": os.getloadavg()}
        for kind in given.attacks:
            results[kind] = measure_attack(kind, running.port, running.pid, honest, given.seconds, given.windows)
            print(kind, json.dumps(results[kind]), flush=True)
        results |= {"honest_answers_by_status": honest.answers, "load_average_after": os.getloadavg()}
    print(write_result(given.name, results, vars(given), seeds=[0]))


if __name__ == "__main__":
    main()
